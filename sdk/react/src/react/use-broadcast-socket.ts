import { useCallback, useEffect, useMemo, useSyncExternalStore } from 'react';
import type { BroadcastClient, BroadcastError } from '../client/index.js';
import type { ClientOptions, Message, Snapshot, Status } from '../types.js';
import { useProvided } from './provider.js';
import { Recent } from './recent.js';
import { useStore } from './store.js';
import type { Broadcast } from './use-broadcast.js';
import { useConnection } from './use-connection.js';

export interface BroadcastSocket extends Broadcast {
  readonly client: BroadcastClient;
  readonly status: Status;
  /** The public name of this client, from the first connection on. */
  readonly clientId: string | undefined;
  /** The last message of whatever channel. Only a component that reads this renders for messages, once a frame. */
  readonly lastMessage: Message | undefined;
  /** What is wrong with the connection at present. */
  readonly error: BroadcastError | undefined;
  readonly close: () => void;
}

/**
 * A connection and its state: the provider's, or one to `url`. Components that name the same `url` (and the same
 * `getToken`, if any) share one.
 */
export function useBroadcastSocket(url?: string, options: ClientOptions = {}): BroadcastSocket {
  const provided = useProvided();
  const own = useConnection(url, options, options.getToken);
  const client = url === undefined ? provided : own;
  if (!client) {
    throw new Error(
      'useBroadcastSocket() needs a url, or a <BroadcastProvider url="wss://..."> around its component.',
    );
  }

  const status = useField(client, 'status', 'idle');
  const clientId = useField(client, 'clientId', undefined);
  const error = useField(client, 'error', undefined);
  // biome-ignore lint/correctness/useExhaustiveDependencies: another client has other messages
  const recent = useMemo(() => new Recent<unknown>(), [client]);
  const shown = useStore(recent);
  useEffect(() => {
    const off = client.on('message', (message) => recent.add(message));
    return () => {
      off();
      recent.end();
    };
  }, [client, recent]);

  // biome-ignore lint/correctness/useExhaustiveDependencies: what is shown is read from `recent`
  return useMemo(
    () => ({
      client,
      publish: client.publish,
      send: client.send,
      reconnect: client.reconnect,
      close: client.close,
      status,
      clientId,
      error,
      get lastMessage() {
        return recent.read().lastMessage;
      },
    }),
    [client, status, clientId, error, recent, shown],
  );
}

/** A field of the client's snapshot; `before` is what it is while a server renders. */
function useField<K extends keyof Snapshot>(client: BroadcastClient, field: K, before: Snapshot[K]) {
  const subscribe = useCallback((changed: () => void) => client.on('status', changed), [client]);
  return useSyncExternalStore(
    subscribe,
    () => client.getSnapshot()[field],
    () => before,
  );
}
