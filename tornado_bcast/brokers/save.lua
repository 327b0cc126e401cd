-- Writes what has changed of a session, unless somebody has taken it over meanwhile.
--
-- KEYS: 1 session hash
-- ARGV: 1 generation of the writer, 2 ttl (ms), 3 '1' when this is the whole session, 4 principal, 5 client id,
--       6 server channel of the writer, then pairs of field and value ('' deletes the field)
-- Answer: 'saved', 'taken' (a newer connection has it: nothing was written) or 'missing' (Redis has lost it, or
--       has an older copy: nothing was written, it must come whole).

local generation = tonumber(ARGV[1])
local stored = tonumber(redis.call('HGET', KEYS[1], 'generation'))
if stored and stored > generation then return 'taken' end
if ARGV[3] == '1' then
  redis.call('DEL', KEYS[1])
  redis.call(
    'HSET', KEYS[1], 'generation', ARGV[1], 'principal', ARGV[4], 'client', ARGV[5], 'owner', ARGV[6]
  )
elseif stored ~= generation then
  return 'missing'
end
for i = 7, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', KEYS[1], ARGV[i])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 'saved'
