-- Returns a young result, or grants the lease to ask RDS.
--
-- KEYS: 1 the result, which begins with its time in 13 digits; 2 the lease
-- ARGV: 1 the age of a young result in milliseconds; 2 the lease in milliseconds; 3 its holder; 4 the longest result in bytes
-- Returns the server's time in milliseconds with 'result', 'long' (a young result that is too long), 'lease', or 'busy'.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stamp = tonumber(redis.call('GETRANGE', KEYS[1], 0, 12))
if stamp and now - stamp < tonumber(ARGV[1]) then
    if redis.call('STRLEN', KEYS[1]) > tonumber(ARGV[4]) then
        return {'long', now, ''}
    end
    return {'result', now, redis.call('GET', KEYS[1])}
end
if redis.call('SET', KEYS[2], ARGV[3], 'NX', 'PX', ARGV[2]) then
    return {'lease', now, ''}
end
return {'busy', now, ''}
