-- Marks a key as proven and clears its rejections.
--
-- KEYS: 1 the mark of a proven key, 2 the probes, 3 the count of rejections of its AK; ARGV[1]: the lifetime of the mark in milliseconds
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
redis.call('DEL', KEYS[2], KEYS[3])
return 0
