import { useMemo } from 'react';
import type { BroadcastClient } from '../client/index.js';
import { useClient } from './provider.js';

export type Broadcast = Pick<BroadcastClient, 'publish' | 'send' | 'reconnect'>;

/** For a component that only publishes: always the same object, and never a reason to render. */
export function useBroadcast(): Broadcast {
  const client = useClient('useBroadcast');
  return useMemo(() => {
    const { publish, send, reconnect } = client;
    return { publish, send, reconnect };
  }, [client]);
}
