"""The Lua scripts of the Redis bus. Each checks everything before it writes anything: a script that fails half way
leaves what it has written. None needs more than Redis 6.2.

A run takes three keys: `run:<id>`, a hash; `log:<id>`, a stream whose ids are `<seq>-0`, so that Redis itself refuses
to repeat a seq; and `snap:<id>`, a hash. They live until `TTL` seconds after the last append. The sorted sets (all with
score 0, so by id, which is by creation) index them.

The hash of a run has the fields of `RunInfo`, and `fence`, `owner`, `bytes` of the log, `first` (the first frame's data
once the log has lost it), `summary` with its `summary_epoch` and `summary_seq`.

A snapshot is `epoch`, `seq`, the first piece of the state as `state`, and the others by their number; there are
`pieces` of them. All but the first are staged, one by one, in a key of their own, which then becomes the snapshot.

Frames leave in the form of `pack`: for each its seq, flags and length (12 bytes, big endian), then its bytes.
"""

_PACK = """
local function pack(seq, flags, data)
  return struct.pack('>I4I4I4', seq, flags, #data) .. data
end
"""

CREATE = """
-- KEYS: run, log, feed, feed counter, runs, runs of the agent, runs of the thread, active, owned, workers,
--       idempotency key
-- ARGV: run, epoch, agent, principal, thread, created, owner, flags, data, ttl, keyed, fingerprint, key ttl,
--       announcement, feed length, feed channel, prefix of run keys, oldest id that an index keeps
if ARGV[11] == '1' then
  local known = redis.call('GET', KEYS[11])
  if known then
    local run, fingerprint = string.match(known, '^(%S+) (%S*)$')
    local meta = redis.call('HMGET', ARGV[17] .. run, 'epoch', 'status', 'head')
    local never_started = meta[2] == 'failed' and meta[3] == '2'
    if meta[1] and not never_started then
      if fingerprint ~= ARGV[12] then return {'conflict'} end
      return {'known', run, meta[1]}
    end
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {'created'} end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'agent', ARGV[3], 'principal', ARGV[4], 'thread', ARGV[5],
  'created', ARGV[6], 'owner', ARGV[7], 'head', '1', 'fence', '1', 'status', 'queued', 'bytes', #ARGV[9])
redis.call('XADD', KEYS[2], '1-0', 'f', ARGV[8], 'd', ARGV[9])
redis.call('EXPIRE', KEYS[1], ARGV[10])
redis.call('EXPIRE', KEYS[2], ARGV[10])
if ARGV[11] == '1' then redis.call('SET', KEYS[11], ARGV[1] .. ' ' .. ARGV[12], 'EX', ARGV[13]) end
for i = 5, 9 do redis.call('ZADD', KEYS[i], 0, ARGV[1]) end
for i = 5, 7 do redis.call('ZREMRANGEBYLEX', KEYS[i], '-', '(' .. ARGV[18]) end
redis.call('EXPIRE', KEYS[7], ARGV[10])
redis.call('SADD', KEYS[10], ARGV[7])
local n = string.format('%d', redis.call('INCR', KEYS[4]))
redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[15], n .. '-0', 'run', ARGV[1], 'a', ARGV[14])
redis.call('PUBLISH', ARGV[16], n .. ' ' .. ARGV[14])
return {'created'}
"""

CLAIM = """
-- KEYS: run, owned by the new owner, workers. ARGV: run, owner, prefix of owned keys
local meta = redis.call('HMGET', KEYS[1], 'fence', 'ended', 'owner')
if not meta[1] then return {'lost'} end
if meta[2] then return {'ended'} end
redis.call('HSET', KEYS[1], 'owner', ARGV[2])
redis.call('ZREM', ARGV[3] .. meta[3], ARGV[1])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[2])
return {'claimed', redis.call('HINCRBY', KEYS[1], 'fence', 1)}
"""

APPEND = (
    _PACK
    + """
-- KEYS: run, log, snap, active, owned
-- ARGV: run, fence, epoch, first seq, status, ended or '', ttl, channel, then flags and data of each frame
local meta = redis.call('HMGET', KEYS[1], 'fence', 'epoch', 'head', 'ended')
if not meta[1] then return {'lost'} end
if meta[1] ~= ARGV[2] then return {'fenced'} end
local head, first = tonumber(meta[3]), tonumber(ARGV[4])
local last = first + (#ARGV - 8) / 2 - 1
if meta[2] == ARGV[3] and last <= head then return {'ok'} end
if meta[4] then return {'ended'} end
if meta[2] ~= ARGV[3] or first ~= head + 1 then return {'mismatch', meta[2], head} end
local packed, bytes = {}, 0
for i = 9, #ARGV, 2 do
  local seq = first + (i - 9) / 2
  redis.call('XADD', KEYS[2], string.format('%d-0', seq), 'f', ARGV[i], 'd', ARGV[i + 1])
  packed[#packed + 1] = pack(seq, tonumber(ARGV[i]), ARGV[i + 1])
  bytes = bytes + #ARGV[i + 1]
end
redis.call('HSET', KEYS[1], 'head', string.format('%d', last), 'status', ARGV[5])
redis.call('HINCRBY', KEYS[1], 'bytes', bytes)
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[1], 'ended', ARGV[6])
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('ZREM', KEYS[5], ARGV[1])
end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ARGV[7]) end
redis.call('PUBLISH', ARGV[8], 'F' .. meta[2] .. ' ' .. table.concat(packed))
return {'ok'}
"""
)

_STORE = """
local function incomplete(staged, pieces)
  return tonumber(pieces) > 1 and redis.call('HLEN', staged) ~= tonumber(pieces) - 1
end
local function store(snap, staged, epoch, seq, state, pieces, ttl)
  local former = tonumber(redis.call('HGET', snap, 'pieces') or 1)
  if tonumber(pieces) > 1 then redis.call('RENAME', staged, snap) end
  redis.call('HSET', snap, 'epoch', epoch, 'seq', seq, 'state', state, 'pieces', pieces)  -- a full Redis refuses this
  for i = tonumber(pieces), former - 1 do redis.call('HDEL', snap, i) end
  redis.call('EXPIRE', snap, ttl)
end
"""

STAGE = """
-- KEYS: run, staged. ARGV: fence, number of the piece, piece, ttl
local fence = redis.call('HGET', KEYS[1], 'fence')
if fence and fence ~= ARGV[1] then return {'fenced'} end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return {'ok'}
"""

REBASE = (
    _STORE
    + """
-- KEYS: run, log, snap, runs, runs of the agent, runs of the thread, active, owned, workers, feed, feed counter, staged
-- ARGV: run, fence, new epoch, seq, state, status, ended or '', ttl, channel, owner, may create,
--       agent, principal, thread, created, announcement, feed length, feed channel, pieces
if incomplete(KEYS[12], ARGV[19]) then return {'incomplete'} end
local meta = redis.call('HMGET', KEYS[1], 'fence', 'ended', 'head')
if meta[1] then
  if meta[1] ~= ARGV[2] then return {'fenced'} end
  if meta[2] then return {'ended'} end
  if tonumber(meta[3]) > tonumber(ARGV[4]) then return {'fenced'} end
else
  if ARGV[11] ~= '1' then return {'lost'} end
  redis.call('HSET', KEYS[1], 'fence', ARGV[2], 'owner', ARGV[10],
    'agent', ARGV[12], 'principal', ARGV[13], 'thread', ARGV[14], 'created', ARGV[15])
  for i = 4, 8 do redis.call('ZADD', KEYS[i], 0, ARGV[1]) end
  redis.call('EXPIRE', KEYS[6], ARGV[8])
  redis.call('SADD', KEYS[9], ARGV[10])
  local n = string.format('%d', redis.call('INCR', KEYS[11]))
  redis.call('XADD', KEYS[10], 'MAXLEN', ARGV[17], n .. '-0', 'run', ARGV[1], 'a', ARGV[16])
  redis.call('PUBLISH', ARGV[18], n .. ' ' .. ARGV[16])
end
local first = redis.call('XRANGE', KEYS[2], '1-0', '1-0')[1]
if first then redis.call('HSET', KEYS[1], 'first', first[2][4]) end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'head', ARGV[4], 'status', ARGV[6], 'bytes', 0,
  'oldest', string.format('%d', tonumber(ARGV[4]) + 1))
store(KEYS[3], KEYS[12], ARGV[3], ARGV[4], ARGV[5], ARGV[19], ARGV[8])
redis.call('EXPIRE', KEYS[1], ARGV[8])
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[1], 'ended', ARGV[7])
  redis.call('ZREM', KEYS[7], ARGV[1])
  redis.call('ZREM', KEYS[8], ARGV[1])
end
redis.call('PUBLISH', ARGV[9], 'H' .. ARGV[3] .. ' ' .. ARGV[4] .. (ARGV[7] ~= '' and ' ended' or ''))
return {'ok'}
"""
)

READ = (
    _PACK
    + """
-- KEYS: run, log. ARGV: epoch, after, most events, most bytes
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head')
if not meta[1] then return {'lost'} end
local head, after = tonumber(meta[2]), tonumber(ARGV[2])
if meta[1] ~= ARGV[1] or after > head then return {'gap'} end
if after < head and redis.call('EXISTS', KEYS[2]) == 0 then return {'gap'} end
local page, bytes, count, seq = {}, 0, 0, after + 1
while seq <= head and count < tonumber(ARGV[3]) and bytes < tonumber(ARGV[4]) do
  local entries = redis.call('XRANGE', KEYS[2], string.format('%d-0', seq), '+', 'COUNT', 20)
  if #entries == 0 then return {'gap'} end
  for _, entry in ipairs(entries) do
    if entry[1] ~= string.format('%d-0', seq) then return {'gap'} end
    local data = entry[2][4]
    page[#page + 1] = pack(seq, tonumber(entry[2][2]), data)
    bytes, count, seq = bytes + #data, count + 1, seq + 1
    if count >= tonumber(ARGV[3]) or bytes >= tonumber(ARGV[4]) then break end
  end
end
return {'page', head, table.concat(page)}
"""
)

READ_ENDS = """
-- ARGV: prefix of run keys, prefix of log keys, most bytes, then runs
-- Gives the first and the last frame's data of each run, or nothing of an unknown one, up to that many bytes.
local function data(log, seq)
  local entry = redis.call('XRANGE', log, seq .. '-0', seq .. '-0')[1]
  return entry and entry[2][4] or false
end
local found, bytes = {}, 0
for i = 4, #ARGV do
  local run = redis.call('HMGET', ARGV[1] .. ARGV[i], 'head', 'first')
  local ends = {}
  if run[1] then
    local log = ARGV[2] .. ARGV[i]
    ends = {run[2] or data(log, '1'), data(log, run[1])}
    bytes = bytes + #(ends[1] or '') + #(ends[2] or '')
    if #found > 0 and bytes > tonumber(ARGV[3]) then break end
  end
  found[#found + 1] = ends
end
return found
"""

STORE_SUMMARIES = """
-- ARGV: prefix of run keys, channel, then run, fence, epoch, seq and packed summary of each
local stored = {}
for i = 3, #ARGV, 5 do
  local key, epoch, seq, summary = ARGV[1] .. ARGV[i], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local run = redis.call('HMGET', key, 'fence', 'epoch', 'summary_epoch', 'summary_seq')
  local older = run[3] == epoch and tonumber(run[4]) > tonumber(seq)
  if run[1] == ARGV[i + 1] and run[2] == epoch and not older then
    redis.call('HSET', key, 'summary', summary, 'summary_epoch', epoch, 'summary_seq', seq)
    stored[#stored + 1] = struct.pack('>I4', #summary) .. summary
  end
end
if #stored > 0 then redis.call('PUBLISH', ARGV[2], table.concat(stored)) end
return #stored
"""

SAVE_SNAPSHOT = (
    _STORE
    + """
-- KEYS: run, log, snap, staged. ARGV: fence, epoch, seq, state, most events, most bytes, ttl, pieces
local meta = redis.call('HMGET', KEYS[1], 'fence', 'epoch', 'bytes')
if not meta[1] then return {'lost'} end
if meta[1] ~= ARGV[1] then return {'fenced'} end
if meta[2] ~= ARGV[2] then return {'ok'} end
local saved = redis.call('HMGET', KEYS[3], 'epoch', 'seq')
if saved[1] == ARGV[2] and tonumber(saved[2]) > tonumber(ARGV[3]) then return {'ok'} end
if incomplete(KEYS[4], ARGV[8]) then return {'incomplete'} end
store(KEYS[3], KEYS[4], ARGV[2], ARGV[3], ARGV[4], ARGV[8], ARGV[7])
local covered, most, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local length, bytes, start, keep = redis.call('XLEN', KEYS[2]), tonumber(meta[3]), '-', nil
local going, first = true, nil
while going and (length > most or bytes > most_bytes) do
  local entries = redis.call('XRANGE', KEYS[2], start, '+', 'COUNT', 20)
  going = #entries > 0
  for _, entry in ipairs(entries) do
    local seq = tonumber(string.match(entry[1], '^(%d+)'))
    if seq > covered or (length <= most and bytes <= most_bytes) then
      going = false
      break
    end
    length, bytes = length - 1, bytes - #entry[2][4]
    if seq == 1 then first = entry[2][4] end
    keep = string.format('%d-0', seq + 1)
    start = keep
  end
end
if keep then
  if first then redis.call('HSET', KEYS[1], 'first', first) end
  redis.call('XTRIM', KEYS[2], 'MINID', keep)
  redis.call('HSET', KEYS[1], 'bytes', bytes, 'oldest', string.match(keep, '^(%d+)'))
end
return {'ok'}
"""
)

ORPHANS = """
-- KEYS: workers. ARGV: prefix of heartbeat keys, prefix of owned keys, most runs, prefix of run keys
-- Gives each worker without a heartbeat, with runs that it owned. Those that have expired are forgotten.
local found, runs = {}, 0
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if redis.call('EXISTS', ARGV[1] .. worker) == 0 and runs < tonumber(ARGV[3]) then
    local all, owned = redis.call('ZRANGE', ARGV[2] .. worker, 0, tonumber(ARGV[3]) - 1), {}
    for _, run in ipairs(all) do
      if redis.call('EXISTS', ARGV[4] .. run) == 1 then
        owned[#owned + 1] = run
      else
        redis.call('ZREM', ARGV[2] .. worker, run)
      end
    end
    if #all == 0 then redis.call('SREM', KEYS[1], worker) end
    runs = runs + #owned
    found[#found + 1] = {worker, owned}
  end
end
return found
"""

FENCED = """
-- ARGV: prefix of run keys, then run and fence of each. Gives the runs that are there under another fence.
local found = {}
for i = 2, #ARGV, 2 do
  local fence = redis.call('HGET', ARGV[1] .. ARGV[i], 'fence')
  if fence and fence ~= ARGV[i + 1] then found[#found + 1] = ARGV[i] end
end
return found
"""
