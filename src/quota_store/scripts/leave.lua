-- Removes the replica ARGV[1] from KEYS[1].
return redis.call('ZREM', KEYS[1], ARGV[1])
