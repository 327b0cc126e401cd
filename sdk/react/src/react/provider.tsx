import { createContext, type ReactNode, useContext, useEffect, useState } from 'react';
import type { BroadcastClient } from '../client/index.js';
import type { ClientOptions } from '../types.js';
import { useConnection } from './use-connection.js';

const ClientContext = createContext<BroadcastClient | undefined>(undefined);

export type BroadcastProviderProps = {
  children?: ReactNode;
} & (
  | {
      /** Where the server is: `wss://example.com/ws`. Another one is another connection. */
      url: string;
      /** Of the connection. Callbacks may change; the others count when it is made (a `key` makes a new one). */
      options?: ClientOptions;
      /** Short for `options.getToken`. */
      getToken?: ClientOptions['getToken'];
      client?: undefined;
    }
  | {
      /** A client of your own. It is connected here, and stays yours to close. */
      client: BroadcastClient;
      url?: undefined;
      options?: undefined;
      getToken?: undefined;
    }
);

/**
 * Gives the components inside one connection. It opens when this is mounted, never while rendering, and closes a
 * moment after this has gone.
 */
export function BroadcastProvider(props: BroadcastProviderProps): ReactNode {
  const { url, client: given, options, getToken, children } = props;
  const [alone] = useState(() => ({}));
  const own = useConnection(
    given ? undefined : url,
    getToken ? { ...options, getToken } : (options ?? {}),
    alone,
  );

  useEffect(() => {
    if (given?.getSnapshot().status === 'idle') given.connect();
  }, [given]);

  const client = given ?? own;
  if (!client) throw new Error('BroadcastProvider needs url="wss://..." or client={...}.');
  return <ClientContext.Provider value={client}>{children}</ClientContext.Provider>;
}

/** The provider's client, if there is a provider. */
export function useProvided(): BroadcastClient | undefined {
  return useContext(ClientContext);
}

/** The provider's client. `hook`: who asks. */
export function useClient(hook: string): BroadcastClient {
  const client = useProvided();
  if (!client) throw new Error(`${hook}() needs a <BroadcastProvider url="wss://..."> around its component.`);
  return client;
}
