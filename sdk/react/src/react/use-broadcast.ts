import { useMemo } from 'react';
import type { BroadcastClient } from '../client/index.js';
import { useClient } from './provider.js';

export type Broadcast = Pick<BroadcastClient, 'publish' | 'send' | 'reconnect'>;

/** For a component that only publishes: always the same object, and never a reason to render. */
export function useBroadcast(): Broadcast {
  const client = useClient('useBroadcast');
  return useMemo(() => bound(client), [client]);
}

/** What a client can do, for destructuring. */
export function bound(client: BroadcastClient): Broadcast & Pick<BroadcastClient, 'close'> {
  return {
    publish: (channel, data, options) => client.publish(channel, data, options),
    send: (channel, data) => client.send(channel, data),
    reconnect: () => client.reconnect(),
    close: () => client.close(),
  };
}
