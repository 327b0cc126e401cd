/** What is shipped: which files need React, and that all entrances are of one piece. */
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { expect, it } from 'vitest';

const code = (name: string) => readFileSync(resolve(import.meta.dirname, '../dist', name), 'utf8');

it("has 'use client' where React is used, and nowhere else", () => {
  expect(code('index.js')).toMatch(/^'use client';\n/);
  expect(code('index.js')).toContain('from"react"');
  for (const name of ['client.js', 'testing.js']) expect(code(name)).not.toMatch(/use client|["']react/);
});

it('has one client, whichever way it is imported', async () => {
  const [hooks, client, testing] = await Promise.all([
    import('tornado-bcast-react'),
    import('tornado-bcast-react/client'),
    import('tornado-bcast-react/testing'),
  ]);
  expect(hooks.BroadcastClient).toBe(client.BroadcastClient);
  expect(hooks.BroadcastError).toBe(client.BroadcastError);
  expect(Object.keys(hooks).sort()).toEqual([
    'BroadcastClient',
    'BroadcastError',
    'BroadcastProvider',
    'useBroadcast',
    'useBroadcastSocket',
    'useSubscription',
  ]);

  const server = new testing.FakeServer();
  const one = new client.BroadcastClient('ws://fake', { WebSocket: server.WebSocket });
  one.connect();
  await one.publish('news', 'hello');
  one.close();
  expect(server.published.map(({ data }) => data)).toEqual(['hello']);
});
