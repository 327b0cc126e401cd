import { Chat } from './chat.js';
import { Meter } from './meter.js';
import { ConnectionStatus } from './status.js';
import { Ticker } from './ticker.js';

export function App() {
  return (
    <>
      <header>
        <h1>Ticker and chat</h1>
        <Meter />
        <ConnectionStatus />
      </header>
      <main>
        <Ticker />
        <Chat />
      </main>
    </>
  );
}
