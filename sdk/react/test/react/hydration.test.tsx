// @vitest-environment jsdom
/** A page that a server has rendered comes to life: the same at first, then connected. */
import { act } from '@testing-library/react';
import { StrictMode } from 'react';
import { hydrateRoot } from 'react-dom/client';
import { renderToString } from 'react-dom/server';
import { expect, it } from 'vitest';
import { BroadcastClient, BroadcastProvider, useBroadcastSocket, useSubscription } from '../../src/index.js';
import { FakeServer } from '../../src/testing/index.js';
import { frame, pass } from './kit.js';

function Page() {
  const { status } = useBroadcastSocket();
  const { messages } = useSubscription<string>('news', { buffer: 3 });
  return (
    <p>
      {status}: {messages.map(({ data }) => data).join()}
    </p>
  );
}

it.each([false, true])(
  'without a mismatch, also where the client is connected already (%s)',
  async (isConnected) => {
    const server = new FakeServer();
    const client = new BroadcastClient('ws://fake', { WebSocket: server.WebSocket });
    const tree = (
      <StrictMode>
        <BroadcastProvider client={client}>
          <Page />
        </BroadcastProvider>
      </StrictMode>
    );
    const container = document.createElement('div');
    container.innerHTML = renderToString(tree);
    expect(container.textContent).toBe('idle: ');
    if (isConnected) {
      client.connect();
      await pass();
    }
    const problems: unknown[] = [];
    const root = await act(async () =>
      hydrateRoot(container, tree, { onRecoverableError: (error) => problems.push(error) }),
    );
    await pass();
    server.publish('news', 'hello');
    await frame();
    expect(container.textContent).toBe('open: hello');
    expect(problems).toEqual([]);
    expect(server.sockets).toHaveLength(1);
    act(() => root.unmount());
    client.close();
  },
);
