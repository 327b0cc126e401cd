import { type Message, useSubscription } from 'tornado-bcast-react';

interface Quote {
  price: number;
}

const SYMBOLS = ['ALDER', 'BIRCH', 'CEDAR', 'DOGWOOD', 'ELM', 'FIR', 'GINKGO', 'HAZEL'];

function parseQuote(data: unknown): Quote {
  const price = (data as Partial<Quote> | null)?.price;
  if (typeof price !== 'number') throw new TypeError('a quote has a price');
  return { price };
}

export function Ticker() {
  return (
    <section aria-labelledby="ticker">
      <h2 id="ticker">Ticker</h2>
      <table>
        <thead>
          <tr>
            <th scope="col">Name</th>
            <th scope="col">Last 60</th>
            <th scope="col">Change</th>
            <th scope="col">Price</th>
          </tr>
        </thead>
        <tbody>
          {SYMBOLS.map((symbol) => (
            <Row key={symbol} symbol={symbol} />
          ))}
        </tbody>
      </table>
    </section>
  );
}

/** A channel of its own, that keeps its last 60 quotes. It renders once a frame at most. */
function Row({ symbol }: { symbol: string }) {
  const { messages, status } = useSubscription<Quote>(`ticker.${symbol}`, {
    parse: parseQuote,
    buffer: 60,
    last: 60,
    ack: false, // An old quote is of no use: after a lost connection the latest is enough.
  });
  const first = messages.at(0)?.data.price;
  const last = messages.at(-1)?.data.price;
  const change = first === undefined || last === undefined ? undefined : (last / first - 1) * 100;
  const trend = change === undefined || Math.abs(change) < 0.005 ? 'flat' : change > 0 ? 'up' : 'down';
  return (
    <tr data-symbol={symbol} data-status={status} data-trend={trend}>
      <th scope="row">{symbol}</th>
      <td>
        <Sparkline quotes={messages} />
      </td>
      <td className="change">
        {change === undefined ? '' : `${change < 0 ? '−' : '+'}${Math.abs(change).toFixed(2)}%`}
      </td>
      <td className="price">{last === undefined ? '–' : last.toFixed(2)}</td>
    </tr>
  );
}

function Sparkline({ quotes }: { quotes: readonly Message<Quote>[] }) {
  const prices = quotes.map((quote) => quote.data.price);
  const low = Math.min(...prices);
  const span = Math.max(...prices) - low || 1;
  const points = prices.map((price, index) => {
    const x = (index / Math.max(prices.length - 1, 1)) * 100;
    return `${x.toFixed(1)},${(22 - ((price - low) / span) * 20).toFixed(1)}`;
  });
  return (
    <svg viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
      <polyline points={points.join(' ')} />
    </svg>
  );
}
