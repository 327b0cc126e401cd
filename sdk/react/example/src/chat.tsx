import { type FormEvent, useEffect, useRef, useState } from 'react';
import { type Message, useBroadcastSocket, useSubscription } from 'tornado-bcast-react';
import { useOnline } from './status.js';

interface Said {
  name: string;
  text: string;
}

/** Something of ours that has not come back yet. */
interface Sending extends Said {
  id: string;
  failed?: string;
}

const OPENED = Date.now();

/** Whatever is published on `chat`, over HTTP too: {"name", "text"}, or a bare string. */
function parseSaid(data: unknown): Said {
  if (typeof data === 'string') return { name: 'HTTP', text: data };
  const { name, text } = (data ?? {}) as Partial<Said>;
  if (typeof text !== 'string') throw new TypeError('a message has a text');
  return { name: typeof name === 'string' && name ? name : 'HTTP', text };
}

export function Chat() {
  const [name, setName] = useState(() => localStorage.getItem('name') ?? '');
  const [gap, setGap] = useState(false);
  const { messages, status, error, publish } = useSubscription<Said>('chat', {
    parse: parseSaid,
    last: 50,
    buffer: 500,
    onGap: () => setGap(true),
  });
  const [outbox, setOutbox] = useState<readonly Sending[]>([]);
  const came = new Set(messages.map((message) => message.messageId));
  const sending = outbox.filter((one) => !came.has(one.id));

  async function send(one: Sending) {
    setOutbox((all) => [...all.filter((other) => other.id !== one.id), one]);
    try {
      // The id makes that it is taken once, however often it has to be sent.
      await publish({ name: one.name, text: one.text }, { id: one.id, timeout: 60_000 });
      setOutbox((all) => all.filter((other) => other.id !== one.id));
    } catch (reason) {
      const failed = reason instanceof Error ? reason.message : String(reason);
      setOutbox((all) => all.map((other) => (other.id === one.id ? { ...other, failed } : other)));
    }
  }

  return (
    <section aria-labelledby="chat">
      <h2 id="chat">Chat</h2>
      <Lines messages={messages} sending={sending} gap={gap} onRetry={send} />
      {status === 'failed' && (
        <p className="notice" role="alert">
          {error?.message}
        </p>
      )}
      <Offline />
      <Composer
        name={name}
        onName={(value) => {
          localStorage.setItem('name', value);
          setName(value);
        }}
        onSend={(text) => send({ id: crypto.randomUUID(), name: name.trim() || 'Somebody', text })}
      />
    </section>
  );
}

function Lines(props: {
  messages: readonly Message<Said>[];
  sending: readonly Sending[];
  gap: boolean;
  onRetry(one: Sending): void;
}) {
  const { clientId } = useBroadcastSocket();
  const list = useRef<HTMLOListElement>(null);
  const follows = useRef(true);
  const { messages, sending } = props;

  // It stays at the end while the reader is there.
  // biome-ignore lint/correctness/useExhaustiveDependencies: what is new makes it longer
  useEffect(() => {
    if (follows.current) list.current?.scrollTo({ top: list.current.scrollHeight });
  }, [messages, sending.length]);

  const fresh = messages.findIndex((message) => message.timestamp >= OPENED);
  const earlier = fresh < 0 ? messages.length : fresh;
  return (
    <ol
      ref={list}
      onScroll={({ currentTarget: { scrollTop, scrollHeight, clientHeight } }) => {
        follows.current = scrollTop + clientHeight > scrollHeight - 20;
      }}
    >
      {props.gap && <li className="divider">Some messages are gone for good</li>}
      {messages.length + sending.length === 0 && <li className="empty">Nobody has said anything yet.</li>}
      {messages.map((message, index) => (
        <Line
          key={message.messageId}
          message={message}
          mine={message.from !== undefined && message.from.clientId === clientId}
          before={messages[index - 1]}
          ends={index === earlier - 1 ? earlier : 0}
        />
      ))}
      {sending.map((one) => (
        <li key={one.id} className="mine pending">
          <p>{one.text}</p>
          {one.failed ? (
            <small role="alert">
              {one.failed}{' '}
              <button
                type="button"
                onClick={() => props.onRetry({ id: one.id, name: one.name, text: one.text })}
              >
                Try again
              </button>
            </small>
          ) : (
            <small>sending…</small>
          )}
        </li>
      ))}
    </ol>
  );
}

/** `ends`: so many messages, of which this is the last, are older than this page. */
function Line(props: {
  message: Message<Said>;
  mine: boolean;
  before: Message<Said> | undefined;
  ends: number;
}) {
  const { message, before } = props;
  const who = message.from?.clientId ?? '';
  const goesOn =
    before !== undefined &&
    before.from?.clientId === message.from?.clientId &&
    before.data.name === message.data.name &&
    message.timestamp - before.timestamp < 120_000;
  return (
    <>
      <li
        className={[props.mine ? 'mine' : 'other', goesOn && 'goes-on', !who && 'http']
          .filter(Boolean)
          .join(' ')}
        data-seq={message.seq}
        style={{ '--hue': hue(who) } as React.CSSProperties}
      >
        {!goesOn && (
          <small>
            <b>{props.mine ? 'You' : message.data.name}</b>{' '}
            <time dateTime={new Date(message.timestamp).toISOString()}>
              {new Date(message.timestamp).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' })}
            </time>
          </small>
        )}
        <p>{message.data.text}</p>
      </li>
      {props.ends > 0 && (
        <li className="divider">
          {props.ends === 1 ? 'One earlier message' : `${props.ends} earlier messages`}
        </li>
      )}
    </>
  );
}

/** A colour for each writer, always the same. */
function hue(text: string): number {
  let sum = 0;
  for (const letter of text) sum = (sum * 31 + letter.charCodeAt(0)) % 360;
  return sum;
}

function Offline() {
  const { status } = useBroadcastSocket();
  const online = useOnline();
  if (online && (status === 'open' || status === 'idle')) return null;
  return (
    <p className="notice" role="status">
      {status === 'closed'
        ? 'The connection is closed.'
        : `${online ? 'The server cannot be reached.' : 'You are offline.'} What you write is sent as soon as that is over, and what you miss arrives then.`}
    </p>
  );
}

function Composer(props: { name: string; onName(name: string): void; onSend(text: string): void }) {
  const [text, setText] = useState('');
  function submit(event: FormEvent) {
    event.preventDefault();
    if (!text.trim()) return;
    props.onSend(text.trim());
    setText('');
  }
  return (
    <form onSubmit={submit}>
      <input
        aria-label="Your name"
        placeholder="Your name"
        value={props.name}
        maxLength={40}
        onChange={(event) => props.onName(event.target.value)}
      />
      <input
        aria-label="Message"
        placeholder="Say something"
        value={text}
        maxLength={2000}
        autoComplete="off"
        onChange={(event) => setText(event.target.value)}
      />
      <button type="submit" disabled={!text.trim()}>
        Send
      </button>
    </form>
  );
}
