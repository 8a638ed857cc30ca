-- Admits an attempt.
--
-- KEYS: 3 the throttle window of the credential, 4 that of the whole API; with a key also 5 the rest of the key, 6 the rest of its AK,
--       7 the mark of a proven key, 8 the probes of an unproven one by their start
-- ARGV: 8 the name of the probe if this replica has not proven the key, else ''; 9 how long a probe in flight keeps another one waiting,
--       twice as long for each further one in flight; 10 the longest time that one is in flight; both in microseconds
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
if KEYS[8] and ARGV[8] ~= '' and redis.call('EXISTS', KEYS[7]) == 0 then
    prune(KEYS[8], tonumber(ARGV[10]))
    -- A reply may have been lost.
    redis.call('ZREM', KEYS[8], ARGV[8])
    local newest = latest(KEYS[8], 1)
    if newest and now < newest + ARGV[9] * 2 ^ (redis.call('ZCARD', KEYS[8]) - 1) then
        return {'probed', 0, ''}
    end
    redis.call('ZADD', KEYS[8], at, ARGV[8])
    redis.call('PEXPIRE', KEYS[8], math.ceil((wait + ARGV[10]) / 1000))
end
take(at)
return {'start', wait, ''}
