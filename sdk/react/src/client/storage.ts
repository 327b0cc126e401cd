/** Where the secret id of the session is kept. */

/** In memory, and in this tab's `sessionStorage` too where `isKept`. */
export const createSession = (url: string, isKept: boolean) => {
  const key = `tornado-bcast:${url}`;

  /** Does nothing where there is no storage: on a server, or where the browser forbids it. */
  const stored = (use: (storage: Storage) => void) => {
    try {
      if (isKept) use(sessionStorage);
    } catch {}
  };

  const session = {
    id: null as string | null,

    /** Null: the session is another one's now. */
    set(id: string | null) {
      session.id = id;
      stored((storage) => (id ? storage.setItem(key, id) : storage.removeItem(key)));
    },
  };
  stored((storage) => {
    session.id = storage.getItem(key);
  });
  return session;
};
