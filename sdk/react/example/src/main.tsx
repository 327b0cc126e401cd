import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { BroadcastProvider } from 'tornado-bcast-react';
import { App } from './app.js';

// ?server=ws://... shows the page of another daemon.
const url = new URLSearchParams(location.search).get('server') ?? 'ws://localhost:8080';

createRoot(document.getElementById('root') as HTMLElement).render(
  <StrictMode>
    {/* The session survives a reload of this tab, so what was missed meanwhile arrives. */}
    <BroadcastProvider url={url} options={{ storage: 'sessionStorage' }}>
      <App />
    </BroadcastProvider>
  </StrictMode>,
);
