-- Admits an attempt.
--
-- KEYS: 3 the throttle window of the credential, 4 that of the whole API; with a key also 5 the rest of the key, 6 the rest of its AK,
--       7 the mark of a proven key, 8 the probe of an unproven one
-- ARGV: 8 '1' if this replica has not proven the key
-- Returns {'throttled', ms, subject}, {'rests', ms}, {'late', microseconds}, {'probed'} or {'start', microseconds}.
local throttled
for i = 3, 4 do
    local ms = redis.call('PTTL', KEYS[i])
    if ms > 0 and (not throttled or ms > throttled[2]) then
        throttled = {'throttled', ms, redis.call('GET', KEYS[i])}
    end
end
if throttled then
    return throttled
end
if KEYS[8] then
    local ms = math.max(redis.call('PTTL', KEYS[5]), redis.call('PTTL', KEYS[6]))
    if ms > 0 then
        return {'rests', ms, ''}
    end
end
local at = earliest()
local wait = at - now
if wait > longest then
    return {'late', wait, ''}
end
if KEYS[8] and ARGV[8] == '1' and redis.call('EXISTS', KEYS[7]) == 0 then
    if not redis.call('SET', KEYS[8], '1', 'NX', 'PX', 1000 + math.ceil(wait / 1000)) then
        return {'probed', 0, ''}
    end
end
take(at)
return {'start', wait, ''}
