import { useEffect, useMemo, useState, useSyncExternalStore } from 'react';
import { BroadcastClient } from '../client/index.js';
import type { ClientOptions } from '../types.js';
import { connections } from './connections.js';
import { useLatest } from './store.js';

/**
 * The client for a URL. It connects once this component is there, and is closed a moment after the last one that
 * uses it has gone. Of the options only the callbacks may change; the others count when it is made.
 *
 * Components share a client when they name the same `url` and the same `by`, which is what it was at first.
 */
export function useConnection(
  url: string | undefined,
  options: ClientOptions,
  by: unknown,
): BroadcastClient | undefined {
  const latest = useLatest(options);
  const [first] = useState(() => ({ by }));
  const own = useMemo(() => {
    if (url === undefined) return undefined;
    const { onStatus, onError, getToken, ...rest } = latest.current;
    const token: ClientOptions = getToken
      ? { getToken: (request) => (latest.current.getToken ?? getToken)(request) }
      : {};
    return connections.find(url, first.by)?.client ?? new BroadcastClient(url, { ...rest, ...token });
  }, [url, first, latest]);
  const client = useSyncExternalStore(
    connections.subscribe,
    () => (url === undefined ? undefined : connections.find(url, first.by)?.client) ?? own,
    () => own,
  );

  useEffect(() => {
    if (url === undefined || !client) return;
    const undo = [
      client.on('status', (status) => latest.current.onStatus?.(status)),
      client.on('error', (error) => (latest.current.onError ?? console.error)(error)),
      connections.hold(url, first.by, client),
    ];
    return () => {
      for (const each of undo) each();
    };
  }, [url, client, first, latest]);

  return client;
}
