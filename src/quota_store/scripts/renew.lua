-- Extends the lease KEYS[1] of the holder ARGV[1] to ARGV[2] milliseconds from now.
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
