import { useEffect, useState } from 'react';
import { useBroadcastSocket } from 'tornado-bcast-react';

/** Messages and animation frames in the last second. Renders once a second, however many messages come. */
export function Meter() {
  const { client } = useBroadcastSocket();
  const [rates, setRates] = useState<{ messages: number; frames: number }>();

  useEffect(() => {
    let messages = 0;
    let frames = 0;
    const off = client.on('message', () => {
      messages += 1;
    });
    let frame = requestAnimationFrame(function count() {
      frames += 1;
      frame = requestAnimationFrame(count);
    });
    const timer = setInterval(() => {
      setRates({ messages, frames });
      messages = 0;
      frames = 0;
    }, 1000);
    return () => {
      off();
      cancelAnimationFrame(frame);
      clearInterval(timer);
    };
  }, [client]);

  return (
    <dl className="meter">
      <div>
        <dt>messages/s</dt>
        <dd>{rates?.messages ?? '–'}</dd>
      </div>
      <div>
        <dt>frames/s</dt>
        <dd>{rates?.frames ?? '–'}</dd>
      </div>
    </dl>
  );
}
