import { useSyncExternalStore } from 'react';
import { type Status, useBroadcastSocket } from 'tornado-bcast-react';

const WORDS: Record<Status, string> = {
  idle: 'Not connected',
  connecting: 'Connecting…',
  open: 'Connected',
  reconnecting: 'Reconnecting…',
  closed: 'Closed',
};

/** Whether the browser has a network. */
export function useOnline(): boolean {
  return useSyncExternalStore(
    (changed) => {
      addEventListener('online', changed);
      addEventListener('offline', changed);
      return () => {
        removeEventListener('online', changed);
        removeEventListener('offline', changed);
      };
    },
    () => navigator.onLine,
    () => true,
  );
}

/** How the connection is, in the corner of the page. */
export function ConnectionStatus() {
  const { status, clientId, error, reconnect } = useBroadcastSocket();
  const online = useOnline();
  const state = online ? status : 'offline';
  return (
    <div className="status" data-state={state} title={clientId ? `client ${clientId}` : undefined}>
      <span className="dot" aria-hidden="true" />
      <output>{online ? WORDS[status] : 'Offline'}</output>
      {status === 'closed' && (
        <button type="button" onClick={reconnect}>
          Connect
        </button>
      )}
      {error && status !== 'open' && online && <small className="why">{error.message}</small>}
    </div>
  );
}
