-- Takes one message, in one step that nobody can see half done: deduplicate, number, store, tell.
--
-- KEYS: 1 dedup key; on persistent channels also 2 hash, 3 stream (all of one hash tag)
-- ARGV: 1 pub/sub name, 2 payload (a JSON object), 3 timestamp (ms), 4 this publication's own token,
--       5 dedup ttl (ms); on persistent channels also 6 the name of an epoch, should one begin now,
--       7 master_replid as the caller knows it ('' unknown), 8 stream length, 9 stream ttl (ms),
--       10 hash ttl (ms)
-- Answer: { duplicate (0 or 1), seq, epoch, master_replid where it was asked for }, seq '0' and epoch '-'
--       on channels that are not persistent.
--
-- Lua is not rolled back, so the order of the writes is what keeps the state whole: everything that can
-- fail (a key of another type, no memory, a full disk) fails at the first write, before anything is changed.
-- The hash lives longest; without it nothing in the stream can be trusted, so the stream goes first.

local ENDS_KEPT = 16

local name, payload, timestamp, token, dedup_ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local dedup, hash, stream = KEYS[1], KEYS[2], KEYS[3]

local function failed(reply)
  return type(reply) == 'table' and reply.err
end

local taken = redis.call('GET', dedup)
if taken then
  local seq, epoch, owner = string.match(taken, '^(%d+) (%S+) (%S+)')
  -- A hit writes, what the key has left and no more: else a WAIT after it would say yes at once.
  local left = redis.call('PTTL', dedup)
  if left < 0 then left = tonumber(dedup_ttl) end
  redis.call('PEXPIRE', dedup, math.max(left, 1))
  -- Its own token: an earlier try of this very publication, whose answer was lost on the way.
  return { owner == token and 0 or 1, seq or '0', epoch or '-' }
end

if not hash then
  redis.call('SET', dedup, '0 - ' .. token, 'PX', dedup_ttl)
  local told = redis.pcall('PUBLISH', name, '0 - ' .. timestamp .. '\n' .. payload)
  if failed(told) then
    redis.call('DEL', dedup)
    return told
  end
  return { 0, '0', '-' }
end

local next_epoch, replid = ARGV[6], ARGV[7]
local size, stream_ttl, hash_ttl = ARGV[8], ARGV[9], tonumber(ARGV[10])

local state = redis.call('HMGET', hash, 'epoch', 'seq', 'replid', 'ends')
local epoch, seq, known, ends = state[1], tonumber(state[2]), state[3], state[4] or ''
local asked = nil

local function ask()
  local info = redis.pcall('INFO', 'replication')
  asked = type(info) == 'string' and string.match(info, 'master_replid:(%x+)') or nil
  replid = asked or replid
end

-- %.0f: tostring() would write 1e+15 for what is still far below 2^53.
local function begin_epoch(last)
  if epoch == next_epoch then return end
  local kept = {}
  for entry in string.gmatch(ends, '[^,]+') do kept[#kept + 1] = entry end
  kept[#kept + 1] = epoch .. ':' .. string.format('%.0f', last)
  while #kept > ENDS_KEPT do table.remove(kept, 1) end
  ends = table.concat(kept, ',')
  epoch = next_epoch
end

if not (epoch and seq) then
  if redis.call('EXISTS', stream) == 1 then redis.call('DEL', stream) end
  ask()
  epoch, seq, ends = next_epoch, 0, ''
elseif known ~= replid then
  ask()
  if known ~= replid then begin_epoch(seq) end
end

local function add()
  local id = string.format('%.0f', seq + 1)
  local bus = id .. ' ' .. epoch .. ' ' .. timestamp .. '\n'
    .. string.sub(payload, 1, -2) .. ',"seq":' .. id .. ',"epoch":"' .. epoch .. '"}'
  return id, bus, redis.pcall('XADD', stream, 'MAXLEN', '=', size, id .. '-0', 'm', bus)
end

local id, bus, added = add()
if failed(added) then
  -- A stream that is ahead of its hash (somebody changed one of the two): go on above both.
  local info = redis.pcall('XINFO', 'STREAM', stream)
  local top = nil
  if not failed(info) then
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then top = tonumber(string.match(info[i + 1], '^%d+')) end
    end
  end
  if not top or top <= seq then return added end
  begin_epoch(seq)
  seq = top
  id, bus, added = add()
  if failed(added) then return added end
end

if epoch == state[1] then
  redis.call('HSET', hash, 'seq', id)
else
  redis.call('HSET', hash, 'epoch', epoch, 'seq', id, 'replid', replid, 'ends', ends)
end
redis.call('SET', dedup, id .. ' ' .. epoch .. ' ' .. token, 'PX', dedup_ttl)
redis.call('PEXPIRE', stream, stream_ttl)
-- To the day is enough, and spares the append-only file a line for each message.
if redis.call('PTTL', hash) < hash_ttl - 86400000 then redis.call('PEXPIRE', hash, hash_ttl) end
local told = redis.pcall('PUBLISH', name, bus)
if failed(told) then return told end
return { 0, id, epoch, asked }
