-- Stores a result, unless a newer one is there, and releases leases.
--
-- KEYS: 1 the result, then leases
-- ARGV: 1 the result, '' for none; 2 its lifetime in milliseconds; 3 the holder of the leases
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[1] ~= '' then
    local known = tonumber(redis.call('GETRANGE', KEYS[1], 0, 12))
    -- A time in the future is not from a replica.
    if not known or known > now + 1000 or known <= tonumber(string.sub(ARGV[1], 1, 13)) then
        redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    end
end
for i = 2, #KEYS do
    if redis.call('GET', KEYS[i]) == ARGV[3] then
        redis.call('DEL', KEYS[i])
    end
end
return 0
