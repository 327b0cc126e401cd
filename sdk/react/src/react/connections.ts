import type { BroadcastClient } from '../client/index.js';
import { Store } from './store.js';

/** Milliseconds that a connection outlives its last user: who comes back in time finds it as it was. */
const GRACE = 100;

interface Connection {
  readonly url: string;
  readonly by: unknown;
  readonly client: BroadcastClient;
  users: number;
  end?: ReturnType<typeof setTimeout>;
}

/**
 * The connections that components of this page use, by `url` and `by` (what they must have in common beside it).
 * Only effects change it, so a server that renders never has one.
 */
class Connections extends Store<readonly Connection[]> {
  find(url: string, by: unknown): Connection | undefined {
    return this.get().find((one) => one.url === url && one.by === by);
  }

  /** Use the connection, which is made with `client` unless there is one already. Returns the undo. */
  hold(url: string, by: unknown, client: BroadcastClient): () => void {
    const connection = this.find(url, by) ?? { url, by, client, users: 0 };
    clearTimeout(connection.end);
    connection.users += 1;
    if (!this.get().includes(connection)) {
      this.set([...this.get(), connection]);
      client.connect();
    }
    return () => {
      connection.users -= 1;
      if (connection.users > 0) return;
      connection.end = setTimeout(() => {
        this.replace(this.get().filter((one) => one !== connection));
        connection.client.close();
      }, GRACE);
    };
  }
}

export const connections = new Connections([]);
