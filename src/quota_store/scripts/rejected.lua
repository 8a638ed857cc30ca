-- Counts a rejected signature. An unproven key rests; after three rejections in ten minutes, with any secret, or if the gateway has
-- locked the key, the AK rests.
--
-- KEYS: 1 the rest of the key, 2 the rest of its AK, 3 the mark of a proven key, 4 the probe, 5 the count of the AK
-- ARGV: 1 the rest in milliseconds, 2 the rejections before a rest, 3 '1' if the gateway has locked the key
local count = redis.call('INCR', KEYS[5])
if count == 1 then
    redis.call('PEXPIRE', KEYS[5], 600000)
end
if ARGV[3] == '1' or count >= tonumber(ARGV[2]) then
    redis.call('SET', KEYS[2], '1', 'PX', ARGV[1])
    redis.call('DEL', KEYS[5])
elseif redis.call('EXISTS', KEYS[3]) == 0 then
    redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
end
redis.call('DEL', KEYS[4])
return 0
