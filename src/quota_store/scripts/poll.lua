-- Admits a poll of a watched task, unless another replica has a young result or polls the task now.
--
-- KEYS: 3 the result, 4 the lease of the poll
-- ARGV: 8 the age of a young result and 9 the lease after the start, in milliseconds; 10 the holder of the lease
-- Returns {'fresh'}, {'busy'}, {'late', microseconds} or {'start', microseconds}.
local stamp = tonumber(redis.call('GETRANGE', KEYS[3], 0, 12))
if stamp and now / 1000 - stamp < tonumber(ARGV[8]) then
    return {'fresh', 0, ''}
end
local holder = redis.call('GET', KEYS[4])
if holder and holder ~= ARGV[10] then
    return {'busy', 0, ''}
end
local at = earliest()
local wait = at - now
if wait > longest then
    return {'late', wait, ''}
end
redis.call('SET', KEYS[4], ARGV[10], 'PX', math.ceil(wait / 1000) + ARGV[9])
take(at)
return {'start', wait, ''}
