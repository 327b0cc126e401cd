-- Reads the state of one persistent channel, and a piece of its stream, as of one moment.
--
-- KEYS: 1 hash, 2 stream
-- ARGV: 1 the name of an epoch, should one begin now, 2 master_replid as the caller knows it ('' unknown),
--       3 seq after which to read (negative: so many of the last ones), 4 how many messages at most,
--       5 how many bytes at most (one message always fits), 6 hash ttl (ms), 7 the same before the first
--       message (ms)
-- Answer: { epoch, seq of the head, ends of earlier epochs as 'e1:120,e2:300', first seq in the stream,
--       { bus messages }, master_replid where it was asked for }
--
-- Where there is no hash, the channel begins here and now: who subscribes needs a position to go on from. As long
-- as nothing has been published it is kept for a shorter time, or subscribing to many names would fill Redis.

local PIECE = 32

local hash, stream = KEYS[1], KEYS[2]
local replid, after, limit, bytes = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local asked = nil

local state = redis.call('HMGET', hash, 'epoch', 'seq', 'ends')
local epoch, seq, ends = state[1], tonumber(state[2]), state[3] or ''

if not (epoch and seq) then
  if redis.call('EXISTS', stream) == 1 then redis.call('DEL', stream) end
  local info = redis.pcall('INFO', 'replication')
  asked = type(info) == 'string' and string.match(info, 'master_replid:(%x+)') or nil
  replid = asked or replid
  epoch, seq, ends = ARGV[1], 0, ''
  redis.call('HSET', hash, 'epoch', epoch, 'seq', '0', 'replid', replid, 'ends', ends)
end
-- Roughly is enough: a head check every 30 s should not write every 30 s.
local hash_ttl = tonumber(ARGV[seq > 0 and 6 or 7])
if redis.call('PTTL', hash) < hash_ttl * 0.9 then redis.call('PEXPIRE', hash, hash_ttl) end

local function number(id)
  return string.match(id, '^%d+')
end

local head = string.format('%.0f', seq)
local oldest = redis.call('XRANGE', stream, '-', head, 'COUNT', 1)
local first = oldest[1] and number(oldest[1][1]) or string.format('%.0f', seq + 1)

local messages = {}
if after < 0 then after = math.max(seq + after, 0) end
while #messages < limit and after < seq and bytes > 0 do
  local piece = redis.call(
    'XRANGE', stream, string.format('%.0f', after + 1), head, 'COUNT', math.min(PIECE, limit - #messages)
  )
  if #piece == 0 then break end
  for _, entry in ipairs(piece) do
    local bus = entry[2][2]
    after = tonumber(number(entry[1]))
    bytes = bytes - #bus
    if bytes < 0 and #messages > 0 then break end
    messages[#messages + 1] = bus
  end
end
return { epoch, head, ends, first, messages, asked }
