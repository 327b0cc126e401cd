import type { BroadcastClient } from '../client/index.js';

/** Milliseconds that a connection outlives its last user: who comes back in time finds it as it was. */
const GRACE = 100;

interface Connection {
  url: string;
  by: unknown;
  client: BroadcastClient;
  users: number;
  end: ReturnType<typeof setTimeout> | undefined;
}

/**
 * The connections that components of this page use, by `url` and `by` (what they must have in common beside it).
 * Only effects change it, so a server that renders never has one.
 */
class Connections {
  readonly #open = new Set<Connection>();
  readonly #listeners = new Set<() => void>();

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  find(url: string, by: unknown): BroadcastClient | undefined {
    return this.#find(url, by)?.client;
  }

  /** Use the connection, which is `client` unless there is one already. Returns the undo. */
  hold(url: string, by: unknown, client: BroadcastClient): () => void {
    const connection = this.#find(url, by) ?? { url, by, client, users: 0, end: undefined };
    clearTimeout(connection.end);
    connection.users += 1;
    if (!this.#open.has(connection)) {
      this.#open.add(connection);
      for (const listener of this.#listeners) listener();
      client.connect();
    }
    return () => {
      connection.users -= 1;
      if (connection.users > 0) return;
      connection.end = setTimeout(() => {
        this.#open.delete(connection);
        connection.client.close();
      }, GRACE);
    };
  }

  #find(url: string, by: unknown): Connection | undefined {
    return [...this.#open].find((one) => one.url === url && one.by === by);
  }
}

export const connections = new Connections();
