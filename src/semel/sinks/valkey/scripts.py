"""The scripts. A script runs alone on the server, and is one unit of its append-only file and of replication.

But it is not rolled back when a command in it fails. So `APPLY` looks at everything before it writes anything: types of
keys, and values of counters, each as the commands before it will have left them. What fails all the same (a right that
is missing) leaves a mark, `torn`, and nobody goes on from there without a person.

Numbers are compared and stored as text: Lua's have 53 bits. Every script answers with a list whose first item is a
word: `ok`; `gone` (there is no position); `torn`, text; `fenced`, next offset, epoch, owner; `bad`, number of the
command, text.
"""

from __future__ import annotations

from semel.databases.valkey.lua import LOOK

__all__ = ["APPLY", "RENEW", "TAKE_OVER"]

# KEYS: position, index. ARGV: topic id, offset to start at or '', owner, name in the index.
TAKE_OVER = """
local found = redis.call('HMGET', KEYS[1], 'topic_id', 'next_offset', 'torn')
if found[3] then return {'torn', found[3]} end
if not found[1] then
  if ARGV[2] == '' then return {'gone'} end
  redis.call('HSET', KEYS[1], 'topic_id', ARGV[1], 'next_offset', ARGV[2], 'owner_epoch', '1', 'owner', ARGV[3],
             'applied', '0')
  redis.call('SADD', KEYS[2], ARGV[4])
  return {'ok', ARGV[2], '1'}
end
if found[1] ~= ARGV[1] then return {'recreated', found[1], found[2]} end
redis.call('HSET', KEYS[1], 'owner', ARGV[3])
return {'ok', found[2], tostring(redis.call('HINCRBY', KEYS[1], 'owner_epoch', 1))}
"""

# KEYS: position. ARGV: owner. After an answer that was lost: whatever is still on its way is fenced.
RENEW = """
local found = redis.call('HMGET', KEYS[1], 'owner', 'next_offset', 'owner_epoch', 'torn')
if not found[1] then return {'gone'} end
if found[4] then return {'torn', found[4]} end
if found[1] ~= ARGV[1] then return {'fenced', found[2], found[3], found[1]} end
return {'ok', found[2], tostring(redis.call('HINCRBY', KEYS[1], 'owner_epoch', 1))}
"""

# KEYS: position, parked, parked keys, commands, outcomes, then every key of an effect.
# ARGV: epoch, from, to, records, and as MessagePack: effects {name, key, ...}, parked {offset, record, key},
# released {offset, key}, again {offset, record}, command {id, what is left of it or '', outcome} or
# {}. Last: 'look' when nothing is to be written, or ''.
APPLY = (
    """
local found = redis.call('HMGET', KEYS[1], 'owner_epoch', 'next_offset', 'owner', 'torn')
if not found[1] then return {'gone'} end
if found[4] then return {'torn', found[4]} end
if found[1] ~= ARGV[1] or found[2] ~= ARGV[2] then return {'fenced', found[2], found[1], found[3]} end
local effects = cmsgpack.unpack(ARGV[5])
"""
    + LOOK
    + """
if ARGV[10] == 'look' then return {'ok'} end

redis.call('HSET', KEYS[1], 'next_offset', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'applied', ARGV[4])
for number, effect in ipairs(effects) do
  local done = redis.pcall(unpack(effect))
  if type(done) == 'table' and done['err'] then
    local text = effect[1] .. ' ' .. effect[2] .. ': ' .. done['err']
    redis.call('HSET', KEYS[1], 'torn', 'offsets ' .. ARGV[2] .. ' to ' .. ARGV[3] .. ', after ' .. (number - 1) ..
               ' of ' .. #effects .. ' commands: ' .. text)
    return {'torn', text}
  end
end
for _, item in ipairs(cmsgpack.unpack(ARGV[6])) do
  redis.call('HSET', KEYS[2], item[1], item[2])
  if item[3] then redis.call('HINCRBY', KEYS[3], item[3], 1) end
end
for _, item in ipairs(cmsgpack.unpack(ARGV[7])) do
  if redis.call('HDEL', KEYS[2], item[1]) == 1 and item[2] then
    if redis.call('HINCRBY', KEYS[3], item[2], -1) <= 0 then redis.call('HDEL', KEYS[3], item[2]) end
  end
end
for _, item in ipairs(cmsgpack.unpack(ARGV[8])) do redis.call('HSET', KEYS[2], item[1], item[2]) end
local command = cmsgpack.unpack(ARGV[9])
if #command > 0 then
  if command[2] == '' then redis.call('HDEL', KEYS[4], command[1])
  else redis.call('HSET', KEYS[4], command[1], command[2]) end
  redis.call('HSET', KEYS[5], command[1], command[3])
end
return {'ok'}
"""
)
