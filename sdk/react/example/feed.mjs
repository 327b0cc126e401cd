// Publishes quotes over HTTP, as a server would: node feed.mjs [http://localhost:8080] [quotes a second]
const url = process.argv[2] ?? 'http://localhost:8080';
const rate = Number(process.argv[3] ?? 24);
const symbols = ['ALDER', 'BIRCH', 'CEDAR', 'DOGWOOD', 'ELM', 'FIR', 'GINKGO', 'HAZEL'];
const prices = new Map(symbols.map((symbol) => [symbol, 20 + Math.random() * 180]));

// One request for each tick, with so many quotes that the rate holds.
const every = Math.max(50, 1000 / rate);
let owed = 0;

async function tick() {
  owed += (rate * every) / 1000;
  const messages = [];
  for (; owed >= 1; owed--) {
    const symbol = symbols[Math.floor(Math.random() * symbols.length)];
    const price = Math.max(1, prices.get(symbol) * (1 + (Math.random() - 0.5) / 100));
    prices.set(symbol, price);
    messages.push({ channel: `ticker.${symbol}`, data: { price: Math.round(price * 100) / 100 } });
  }
  if (messages.length === 0) return;
  try {
    const answer = await fetch(`${url}/broadcast`, {
      method: 'POST',
      body: JSON.stringify({ messages }),
      signal: AbortSignal.timeout(5000),
    });
    if (!answer.ok) console.error(`${answer.status}: ${await answer.text()}`);
  } catch (error) {
    console.error(`${url} does not answer: ${error.cause?.message ?? error.message}`);
  }
}

console.log(`${rate} quotes a second to ${url}; Ctrl-C stops`);
setInterval(tick, every);
