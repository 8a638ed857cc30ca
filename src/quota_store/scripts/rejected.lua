-- Counts a rejected signature. An unproven key rests; after three rejections in ten minutes, with any secret, or if the gateway has
-- locked the key, the AK rests.
--
-- KEYS: 1 the rest of the key, 2 the rest of its AK, 3 the mark of a proven key, 4 the probes, 5 the count of the AK
-- ARGV: 1 the rest in milliseconds, 2 the rejections before a rest, 3 'locked' if the gateway has locked the key, 'proven' if this replica
--       has proven it, although the store may have lost the mark, else 'unproven'
local count = redis.call('INCR', KEYS[5])
if count == 1 then
    redis.call('PEXPIRE', KEYS[5], 600000)
end
if ARGV[3] == 'locked' or count >= tonumber(ARGV[2]) then
    redis.call('SET', KEYS[2], '1', 'PX', ARGV[1])
    redis.call('DEL', KEYS[5])
elseif ARGV[3] == 'unproven' and redis.call('EXISTS', KEYS[3]) == 0 then
    redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
end
redis.call('DEL', KEYS[4])
return 0
