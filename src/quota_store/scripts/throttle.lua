-- Stores a throttle window: KEYS[1], ARGV[1] its length in milliseconds, ARGV[2] its subject. The longer of two windows counts.
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
end
return 0
