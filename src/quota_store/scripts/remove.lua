-- Removes ARGV[1], a replica or a probe, from KEYS[1].
return redis.call('ZREM', KEYS[1], ARGV[1])
