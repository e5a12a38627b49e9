"""The scripts of the dual write. Each is one atomic step, and one unit of the server's append-only file.

A slot is a hash: `owner_epoch`, `owner`, `prepared`, `beat` as in `semel_txn`, `claimed` (what `prepared` was when the
slot changed hands last), and `torn` where a command failed in the middle all the same. Every script answers with a list
whose first item is a word.
"""

from __future__ import annotations

from semel.databases.valkey.lua import LOOK

__all__ = ["ADD", "APPLY", "BEAT", "CLAIM", "OPEN", "RENEW", "RESERVE"]

# KEYS: meta. ARGV: schema version, Kafka cluster ('' where it is not known), app, 'create' or ''.
OPEN = """
local found = redis.call('HMGET', KEYS[1], 'schema_version', 'environment', 'app')
if not found[1] then
  if ARGV[4] == '' then return {'gone'} end
  redis.call('HSET', KEYS[1], 'schema_version', ARGV[1], 'environment', ARGV[2], 'app', ARGV[3], 'slots', '0')
  return {'ok'}
end
if found[1] ~= ARGV[1] then return {'version', found[1]} end
if found[2] == '' then redis.call('HSET', KEYS[1], 'environment', ARGV[2])
elseif found[2] ~= ARGV[2] and ARGV[2] ~= '' then return {'environment', found[2]} end
return {'ok'}
"""

# KEYS: meta, index. ARGV: prefix of the slots, prefix of their keys, owner, most slots.
ADD = """
local number = tonumber(redis.call('HGET', KEYS[1], 'slots') or '-1')
if number < 0 then return {'gone'} end
if number >= tonumber(ARGV[4]) then return {'full', tostring(number)} end
local slot = ARGV[1] .. string.format('%.0f', number)
redis.call('HINCRBY', KEYS[1], 'slots', 1)
redis.call('HSET', ARGV[2] .. slot, 'owner_epoch', '0', 'owner', ARGV[3], 'prepared', '', 'claimed', '', 'beat', '0')
redis.call('SADD', KEYS[2], slot)
return {'ok', slot}
"""

# KEYS: slot. ARGV: owner, owner epoch as it was seen, owner as it was seen.
RESERVE = """
local found = redis.call('HMGET', KEYS[1], 'owner', 'owner_epoch')
if found[1] ~= ARGV[3] or found[2] ~= ARGV[2] then return {'taken'} end
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
return {'ok'}
"""

# KEYS: slot. ARGV: owner.
CLAIM = """
local found = redis.call('HMGET', KEYS[1], 'prepared', 'torn')
if not found[1] then return {'gone'} end
if found[2] then return {'torn', found[2]} end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'claimed', found[1])
redis.call('HINCRBY', KEYS[1], 'beat', 1)
return {'ok', tostring(redis.call('HINCRBY', KEYS[1], 'owner_epoch', 1)), found[1]}
"""

# KEYS: slot. ARGV: owner. After an answer that was lost: whatever is still on its way to the server is fenced.
RENEW = """
local found = redis.call('HMGET', KEYS[1], 'owner', 'owner_epoch', 'prepared', 'claimed', 'torn')
if not found[1] then return {'gone'} end
if found[5] then return {'torn', found[5]} end
if found[1] ~= ARGV[1] then return {'fenced', found[2], found[3], found[4], found[1]} end
redis.call('HSET', KEYS[1], 'claimed', found[3])
return {'ok', tostring(redis.call('HINCRBY', KEYS[1], 'owner_epoch', 1)), found[3]}
"""

# KEYS: slot. ARGV: owner, 1 to beat or 0 to release.
BEAT = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return {'taken'} end
if ARGV[2] == '1' then redis.call('HINCRBY', KEYS[1], 'beat', 1) else redis.call('HSET', KEYS[1], 'owner', '') end
return {'ok'}
"""

# KEYS: slot, then every key of a condition or an effect. ARGV: owner epoch, owner, prepared before and after, and as
# MessagePack: conditions {key, least[, field]}, effects {name, key, ...}. Without a slot KEYS[1] and ARGV[1] are ''.
# Answers ok; gone; torn, text; fenced, owner epoch, owner; lost, prepared; unmet, number, value or ''; bad, number,
# text; denied, number, command; refused, text (the server takes no writes now).
APPLY = (
    """
local slot = ARGV[1] ~= ''
if slot then
  local found = redis.call('HMGET', KEYS[1], 'owner_epoch', 'owner', 'prepared', 'torn')
  if not found[1] then return {'gone'} end
  if found[4] then return {'torn', found[4]} end
  if found[1] ~= ARGV[1] or found[2] ~= ARGV[2] then return {'fenced', found[1], found[2]} end
  if ARGV[3] ~= '?' and found[3] ~= ARGV[3] then return {'lost', found[3]} end
end
local effects = cmsgpack.unpack(ARGV[6])

local function below(one, other)
  local minus, others = string.sub(one, 1, 1) == '-', string.sub(other, 1, 1) == '-'
  if minus ~= others then return minus end
  if minus then one, other = string.sub(other, 2), string.sub(one, 2) end
  if #one ~= #other then return #one < #other end
  return one < other
end

for number, condition in ipairs(cmsgpack.unpack(ARGV[5])) do
  local kind, value = redis.call('TYPE', condition[1])['ok'], nil
  if kind ~= 'none' and kind ~= (condition[3] and 'hash' or 'string') then
    return {'bad', '0', 'the condition on ' .. condition[1] .. ': it holds a ' .. kind}
  end
  if condition[3] then value = redis.call('HGET', condition[1], condition[3])
  else value = redis.call('GET', condition[1]) end
  local count = value or '0'
  if count ~= '0' and not string.match(count, '^%-?[1-9]%d*$') then
    return {'bad', '0', 'the condition on ' .. condition[1] .. ': it holds no integer'}
  end
  if below(count, condition[2]) then return {'unmet', tostring(number), value or ''} end
end
"""
    + LOOK
    + """
for number, effect in ipairs(effects) do
  if not redis.acl_check_cmd(unpack(effect)) then return {'denied', tostring(number), effect[1] .. ' ' .. effect[2]} end
end

if slot then
  local done = redis.pcall('HSET', KEYS[1], 'prepared', ARGV[4])
  if type(done) == 'table' and done['err'] then return {'refused', done['err']} end
end
for number, effect in ipairs(effects) do
  local done = redis.pcall(unpack(effect))
  if type(done) == 'table' and done['err'] then
    if number == 1 and not slot then return {'refused', done['err']} end
    local text = effect[1] .. ' ' .. effect[2] .. ': ' .. done['err']
    if slot then
      redis.call('HSET', KEYS[1], 'torn', 'transaction ' .. ARGV[4] .. ', after ' .. (number - 1) .. ' of ' ..
                 #effects .. ' commands: ' .. text)
    end
    return {'torn', text}
  end
end
return {'ok'}
"""
)
