# SPDX-License-Identifier: Apache-2.0
"""
The scripts that copy and import: messages wait under keys of their own until all have come, and then appear at once.
"""

from haystack_chat_store.stores.redis.scripts import (
    CHANGED_AT,
    EXPIRE,
    FIND_PREVIEWS,
    LIST_HISTORY,
    NOW,
    OF_BUCKET_AND_HISTORY,
    ONCE,
    REMEMBER_CALL,
    STATE_OF,
    Script,
)

#: Add messages to the waiting ones. Keys: the bucket's schema version, those of the waiting messages. Arguments: how
#: many wait already; for how many milliseconds they wait; the first letter of each message's role, x for a gap; the
#: messages' ids, separated by NUL; their times; their contents, each an argument. Returns an empty text, or an id that
#: is there twice; then nothing was added.
STAGE = Script(
    """
local _, contents, roles, message_ids, times = unpack(KEYS)
local waiting, letters, length = tonumber(ARGV[1]), ARGV[3], redis.call('LLEN', contents)
if length == waiting + #letters then return '' end  -- by an earlier attempt of this call
if length ~= waiting then return redis.error_reply('STAGEDLOST') end
local new_ids, is_new, index = {}, {}, 0
for message_id in string.gmatch(ARGV[4], '%Z+') do
    repeat index = index + 1 until string.byte(letters, index) ~= 120  -- x
    if is_new[message_id] or redis.call('HEXISTS', message_ids, message_id) == 1 then return message_id end
    is_new[message_id] = true
    new_ids[#new_ids + 1], new_ids[#new_ids + 2] = message_id, waiting + index - 1
end
redis.call('APPEND', times, ARGV[5])
redis.call('APPEND', roles, letters)
for first = 6, #ARGV, 1000 do
    redis.call('RPUSH', contents, unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
for first = 1, #new_ids, 2000 do
    redis.call('HSET', message_ids, unpack(new_ids, first, math.min(first + 1999, #new_ids)))
end
for key = 2, 5 do redis.call('PEXPIRE', KEYS[key], ARGV[2]) end
return ''
"""
)

#: Discard the waiting messages. Keys: the bucket's schema version, those of the waiting messages.
DISCARD = Script("return redis.call('UNLINK', unpack(KEYS, 2))")

#: Discard the waiting messages of another client, which then cannot finish, even if none wait. Keys: the bucket's
#: schema version, those of the waiting messages. Argument: for how many milliseconds.
FENCE = Script("""
redis.call('RPUSH', KEYS[2], '')
redis.call('LTRIM', KEYS[2], -1, -1)
redis.call('UNLINK', unpack(KEYS, 3))
return redis.call('PEXPIRE', KEYS[2], ARGV[1])
""")

_OF_STAGED = """
local staged_contents, staged_roles, staged_ids, staged_times = unpack(KEYS, 12)
local waiting = tonumber(ARGV[3])
if redis.call('LLEN', staged_contents) ~= waiting or redis.call('STRLEN', staged_roles) ~= waiting then
    return redis.error_reply('STAGEDLOST')
end
"""

#: Puts the waiting messages into the place of the history's own.
TAKE_THE_PLACE = """
for index, key in ipairs({contents, roles, message_ids, times}) do
    if redis.call('EXISTS', KEYS[11 + index]) == 1 then
        redis.call('RENAME', KEYS[11 + index], key)
        redis.call('PERSIST', key)
    else
        redis.call('UNLINK', key)
    end
end
"""

#: Append the waiting messages to a history, all at once. Keys: those of the bucket, of the history, of the waiting
#: messages. Arguments: the history's id; milliseconds until it expires, 0 for never, or @ and a time; how many messages
#: wait, gaps included; how many of them are user messages; the revision that the history must have, or nothing if it
#: must have no messages; a name for this call; the time of the change, `now`, or nothing for now; for a history that is
#: new or must have no messages, names of fields and values of its hash, in turn; a revision that the history is to
#: exceed; how many gaps wait; the user. If no messages wait, nothing changes, except that a new history is made if a
#: time is given. Returns how many messages waited, or ACCESS, or OTHER if the history is there and not of the user
#: given, or CHANGED and the history's revision, or DUPLICATE and the id of a message that it has.
FINISH = Script(
    "local call = ARGV[6]",
    ONCE,
    OF_BUCKET_AND_HISTORY,
    NOW,
    CHANGED_AT,
    FIND_PREVIEWS,
    """
local chat_history_id = ARGV[1]
local ttl = tonumber(ARGV[2]) or math.max(1, string.sub(ARGV[2], 2) - milliseconds)
local gaps = tonumber(ARGV[#ARGV - 1])
next_revision = math.max(next_revision, ARGV[#ARGV - 2] + 1)
if ARGV[5] == '' and message_count > 0 or ARGV[5] ~= '' and tonumber(ARGV[5]) ~= revision then
    return {'CHANGED', revision}
end
""",
    _OF_STAGED,
    """
if waiting == 0 and not (is_new and ARGV[7] ~= '') then return 0 end
if not is_new then
    for index = 8, #ARGV - 4, 2 do
        if ARGV[index] == 'user_id' and ARGV[index + 1] ~= owner then return {'OTHER', ''} end
    end
end
local moved = {}
if position > 0 then
    local cursor = '0'
    repeat
        local answer = redis.call('HSCAN', staged_ids, cursor, 'COUNT', 1000)
        cursor = answer[1]
        for index = 1, #answer[2], 2 do
            if redis.call('HEXISTS', message_ids, answer[2][index]) == 1 then
                return {'DUPLICATE', answer[2][index]}
            end
            moved[#moved + 1], moved[#moved + 2] = answer[2][index], position + answer[2][index + 1]
        end
    until cursor == '0'
end

local result, updated_at = waiting, changed_at(tonumber(ARGV[7]) and ARGV[7] or microseconds)
""",
    f"""
if position > 0 then
    redis.call('APPEND', times, redis.call('GET', staged_times))
    redis.call('APPEND', roles, redis.call('GET', staged_roles))
    for first = 0, waiting - 1, 1000 do
        redis.call('RPUSH', contents, unpack(redis.call('LRANGE', staged_contents, first, first + 999)))
    end
    for first = 1, #moved, 2000 do
        redis.call('HSET', message_ids, unpack(moved, first, math.min(first + 1999, #moved)))
    end
    redis.call('UNLINK', unpack(KEYS, 12))
end
revision = next_revision
redis.call('HSET', history, 'revision', revision, 'next_position', position + waiting,
    'message_count', message_count + waiting - gaps, 'round_count', round_count + tonumber(ARGV[4]),
    'updated_at', updated_at)
if is_new then
    redis.call('HSET', history, 'created_at', microseconds, unpack(ARGV, 8, #ARGV - 3))
    owner = redis.call('HGET', history, 'user_id')
elseif ARGV[5] == '' then
    redis.call('HSET', history, unpack(ARGV, 8, #ARGV - 3))
end
if position == 0 then
    {TAKE_THE_PLACE}
end
if waiting > 0 then unindex(chat_history_id, position) end
find_previews()
{LIST_HISTORY}
{REMEMBER_CALL}
""",
    EXPIRE,
    STATE_OF,
    """
local renaming = is_new and redis.call('HGET', history, 'renaming')
if renaming then redis.call('HSET', history, 'renaming', renaming .. ' ' .. state_of(history)) end
return result
""",
)
