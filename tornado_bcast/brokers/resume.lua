-- Takes a session over: from the connection that held it, if any, to a new one.
--
-- KEYS: 1 session hash
-- ARGV: 1 principal, 2 server channel of the worker that takes it, 3 prefix, 4 ttl (ms), 5 the session's name
-- Answer: false where there is no such session of this principal, which then stays as it is; else the hash,
--       with the generation raised.
--
-- The worker that held it is told on its own channel; should it not hear that, its next write is refused.

local stored = redis.call('HMGET', KEYS[1], 'principal', 'owner')
if stored[1] ~= ARGV[1] then return false end
local generation = redis.call('HINCRBY', KEYS[1], 'generation', 1)
redis.call('HSET', KEYS[1], 'owner', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
local notice = '0 - 0\n' .. ARGV[5] .. ' ' .. string.format('%.0f', generation)
redis.pcall('PUBLISH', ARGV[3] .. ':{' .. stored[2] .. '}', notice)
return redis.call('HGETALL', KEYS[1])
