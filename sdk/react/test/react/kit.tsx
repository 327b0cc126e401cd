/** What the tests of the hooks share: a fake server, its provider, and a clock turned by hand. */
import { act, cleanup, render } from '@testing-library/react';
import { Profiler, type ReactNode, StrictMode } from 'react';
import { afterEach, beforeEach, expect, vi } from 'vitest';
import { BroadcastProvider, type ClientOptions } from '../../src/index.js';
import type { FakeServer } from '../../src/testing/index.js';

Object.assign(globalThis, { IS_REACT_ACT_ENVIRONMENT: true });

/** What the console was told in red since the last look. A test that leaves something here fails. */
export const complaints: string[] = [];

export const told = () => complaints.splice(0);

beforeEach(() => {
  vi.useFakeTimers();
  // Chance is always in the middle, as in the tests of the client.
  vi.spyOn(Math, 'random').mockReturnValue(0.5);
  vi.spyOn(console, 'error').mockImplementation((...args) => complaints.push(args.map(String).join(' ')));
});
afterEach(() => {
  cleanup();
  vi.useRealTimers();
  expect(told()).toEqual([]);
});

/** Let so many ms pass, and everything happen that is due then. */
export const pass = (ms = 20) => act(() => vi.advanceTimersByTimeAsync(ms));

/** Two frames: what has come is shown. */
export const frame = () => pass(40);

/** Render inside a provider that is connected to the server. */
export async function show(
  server: FakeServer,
  element: ReactNode,
  options: ClientOptions = {},
  isStrict = false,
) {
  const Mode = isStrict ? StrictMode : Plain;
  const tree = (inside: ReactNode) => (
    <Mode>
      <BroadcastProvider url="ws://fake" options={{ WebSocket: server.WebSocket, ...options }}>
        {inside}
      </BroadcastProvider>
    </Mode>
  );
  const { rerender, ...rest } = render(tree(element));
  await pass();
  return { ...rest, rerender: (inside: ReactNode) => rerender(tree(inside)) };
}

function Plain({ children }: { children?: ReactNode }) {
  return children;
}

/** Counts how often what is inside is rendered and kept. */
export function makeCounter() {
  const counter = {
    renders: 0,
    Counted: ({ children }: { children: ReactNode }) => (
      <Profiler
        id="counted"
        onRender={() => {
          counter.renders += 1;
        }}
      >
        {children}
      </Profiler>
    ),
  };
  return counter;
}
