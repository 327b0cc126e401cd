/** Where the secret id of the session is kept. */

/** In memory, and in this tab's `sessionStorage` too where `kept`. */
export const createSession = (url: string, kept: boolean) => {
  const key = `tornado-bcast:${url}`;
  let session: string | null | undefined;

  /** Runs without a storage too: on a server, or where the browser forbids it. */
  const stored = <R>(use: (storage: Storage) => R) => {
    try {
      return kept ? use(sessionStorage) : null;
    } catch {
      return null;
    }
  };

  return {
    get() {
      if (session === undefined) session = stored((storage) => storage.getItem(key));
      return session;
    },

    /** Null: the session is another one's now. */
    set(id: string | null) {
      if (id === session) return;
      session = id;
      stored((storage) => (id ? storage.setItem(key, id) : storage.removeItem(key)));
    },
  };
};
