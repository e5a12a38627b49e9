"""What the scripts of sinks and of the dual write share, in Lua.

A script runs alone on the server, and is one unit of its append-only file and of replication. But it is not rolled back
when a command in it fails. So everything is looked at before anything is written: types of keys, and values of
counters, each as the commands before it will have left them.
"""

from __future__ import annotations

__all__ = ["LOOK"]

LOOK = """
local holds = {INCRBY='string', HSET='hash', HDEL='hash', HINCRBY='hash', SADD='set', SREM='set', ZADD='zset',
               ZREM='zset', ZINCRBY='zset', LPUSH='list', RPUSH='list', LTRIM='list'}
local kinds, strings, fields = {}, {}, {}

local function kind_of(key)
  if not kinds[key] then kinds[key] = redis.call('TYPE', key)['ok'] end
  return kinds[key]
end

local function sum(text, step)
  if not text then text = '0' end
  if text ~= '0' and not string.match(text, '^%-?[1-9]%d*$') then return nil, 'holds no integer' end
  local value = tonumber(text) + tonumber(step)
  if math.abs(tonumber(text)) > 9e18 or math.abs(value) > 9e18 then return nil, 'would count too far' end
  return string.format('%.0f', value)
end

local function fields_of(key)
  if not fields[key] then fields[key] = {} end
  return fields[key]
end

local function look(effect)
  local name, key = effect[1], effect[2]
  if name == 'SET' then
    kinds[key], strings[key] = 'string', effect[3]
  elseif name == 'DEL' then
    kinds[key], strings[key], fields[key] = 'none', '0', {new = true}
  elseif name ~= 'PEXPIRE' then
    local kind = kind_of(key)
    if kind ~= 'none' and kind ~= holds[name] then return 'it holds a ' .. kind end
    kinds[key] = holds[name]
    if name == 'INCRBY' then
      local value, why = sum(strings[key] or redis.call('GET', key), effect[3])
      if not value then return 'it ' .. why end
      strings[key] = value
    elseif name == 'HSET' then
      local own = fields_of(key)
      for at = 3, #effect, 2 do own['f' .. effect[at]] = effect[at + 1] end
    elseif name == 'HDEL' then
      local own = fields_of(key)
      for at = 3, #effect do own['f' .. effect[at]] = '0' end
    elseif name == 'HINCRBY' then
      local own = fields_of(key)
      local text = own['f' .. effect[3]]
      if not text and not own.new then text = redis.call('HGET', key, effect[3]) end
      local value, why = sum(text, effect[4])
      if not value then return 'its field ' .. effect[3] .. ' ' .. why end
      own['f' .. effect[3]] = value
    end
  end
end

for number, effect in ipairs(effects) do
  local why = look(effect)
  if why then return {'bad', tostring(number), effect[1] .. ' ' .. effect[2] .. ': ' .. why} end
end
"""
"""Goes behind `local effects = ...`, a list of {name, key, arguments}. Answers `bad`, number, text where one of them
cannot be done; else the script goes on, and has written nothing yet."""
