// @vitest-environment jsdom
/** The recipe of the README for testing an app; test/readme.test.ts holds the two together. */
// From here on as in the README.
import { cleanup, render, screen } from '@testing-library/react';
import { BroadcastProvider, useSubscription } from 'tornado-bcast-react';
import { FakeServer } from 'tornado-bcast-react/testing';
import { afterEach, expect, test } from 'vitest';

afterEach(cleanup);

function Orders() {
  const { status, messages } = useSubscription<string>('orders', { buffer: 10 });
  return (
    <p>
      {status}: {messages.map((message) => message.data).join()}
    </p>
  );
}

test('orders that were missed arrive, each once', async () => {
  const server = new FakeServer({ persistent: ['orders'] });
  const options = { WebSocket: server.WebSocket, reconnect: { min: 10, max: 10 } };
  render(
    <BroadcastProvider url="ws://fake" options={options}>
      <Orders />
    </BroadcastProvider>,
  );
  await screen.findByText('subscribed:');
  server.publish('orders', 'tea');
  await screen.findByText('subscribed: tea');

  server.connection.drop();
  server.publish('orders', 'cake');
  await screen.findByText('subscribed: tea,cake');
  expect(server.connections).toHaveLength(2);
});
