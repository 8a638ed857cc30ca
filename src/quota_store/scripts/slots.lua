-- The start of every script that takes a start from a rate. The time is the server's, in microseconds, never a client's.
--
-- KEYS[1]: all starts by time, future ones included; KEYS[2]: of these, first polls of watches.
-- ARGV: 1 starts in a window, 0 for no rate; 2 the window; 3 the spacing; 4 the limit of first polls, 0 unless this is one;
--       5 '1' if the start has waited; 6 the longest wait; 7 a random id of the start
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local calls, window, spacing = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local limit, longest = tonumber(ARGV[4]), tonumber(ARGV[6])

-- The time of the start with this rank, counted from the latest.
local function latest(key, rank)
    local entry = redis.call('ZREVRANGE', key, rank - 1, rank - 1, 'WITHSCORES')
    return entry[2] and tonumber(entry[2])
end

-- Removes starts that are older than `age`, and those later than any reserved start: from a server whose clock was ahead.
local function prune(key, age)
    -- Changes nothing, but fails without memory. A script that has written, even to delete, would be let through.
    redis.call('ZADD', key, 'XX', 0, '')
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now - age)
    redis.call('ZREMRANGEBYSCORE', key, now + 600000000, '+inf')
end

local function earliest()
    if calls == 0 then
        return now
    end
    prune(KEYS[1], window)
    prune(KEYS[2], window)
    local at = now
    local oldest = latest(KEYS[1], calls)
    if oldest then
        at = math.max(at, oldest + window)
    end
    oldest = limit > 0 and latest(KEYS[2], limit)
    if oldest then
        at = math.max(at, oldest + window)
    end
    if spacing > 0 then
        -- First polls that wait for their start do not delay repeated polls, which may start earlier.
        local rank = 1
        local newest = latest(KEYS[1], rank)
        while newest and newest > now and newest == latest(KEYS[2], rank) do
            rank = rank + 1
            newest = latest(KEYS[1], rank)
        end
        if newest and (ARGV[5] == '1' or at > now or newest > now) then
            at = math.max(at, newest + spacing)
        end
    end
    return at
end

local function take(at)
    if calls == 0 then
        return
    end
    local expiry = math.ceil((at - now + window) / 1000)
    for i = 1, limit > 0 and 2 or 1 do
        redis.call('ZADD', KEYS[i], at, ARGV[7])
        -- A later start may be reserved already.
        if redis.call('PTTL', KEYS[i]) < expiry then
            redis.call('PEXPIRE', KEYS[i], expiry)
        end
    end
end

