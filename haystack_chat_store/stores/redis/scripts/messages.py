# SPDX-License-Identifier: Apache-2.0
"""The scripts that write, read and remove messages."""

from typing import Final

from haystack_chat_store.stores.redis.schema import TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import (
    AGE_BUCKET,
    CHANGED_AT,
    EXPIRE,
    FIND_PREVIEWS,
    KEEP_REVISION,
    LIST_HISTORY,
    NOW,
    OF_BUCKET_AND_HISTORY,
    OF_HISTORY,
    ONCE,
    REMEMBER_CALL,
    SET_EXPIRY,
    Script,
    if_absent,
)

#: Append messages, and replace some. Keys: those of the bucket, those of the history. Arguments: the history's id;
#: milliseconds until it expires, 0 for never; the first letter of each message's role; the messages' ids, separated by
#: NUL; the policy; the revision that the history must have, or nothing; a name for this call; then the messages'
#: contents, each an argument; the beginning of the first question among them, or nothing; the letter of the role and
#: the beginning of the last one that is no system message, or nothing; the user. Returns how many this call has
#: written, or the reason why it has not: ACCESS, CHANGED and the history's revision, or DUPLICATE and an id.
WRITE = Script(
    "local call = ARGV[7]",
    ONCE,
    OF_BUCKET_AND_HISTORY,
    NOW,
    CHANGED_AT,
    FIND_PREVIEWS,
    """
local chat_history_id, ttl, letters, policy, expected = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[5], ARGV[6]
local is_expected = expected == '' or tonumber(expected) == revision
local compares = policy == 'overwrite' or policy == 'skip' and not is_expected

local rounds, new, new_roles, new_ids, replaced, duplicate = 0, {}, {}, {}, {}, nil
local index = 0
for message_id in string.gmatch(ARGV[4], '%Z+') do
    index = index + 1
    local role = string.sub(letters, index, index)
    local known = redis.call('HGET', message_ids, message_id)
    if not known then
        new[#new + 1] = ARGV[7 + index]
        new_roles[#new] = role
        new_ids[2 * #new - 1], new_ids[2 * #new] = message_id, position + #new - 1
        if role == 'u' then rounds = rounds + 1 end
    elseif policy == 'fail' then
        duplicate = duplicate or message_id
    elseif compares then
        local was = redis.call('GETRANGE', roles, known, known)
        if was == '' or was == 'x' then return redis.error_reply('DAMAGED ' .. history) end
        if was ~= role or redis.call('LINDEX', contents, known) ~= ARGV[7 + index] then
            if was == 'u' then rounds = rounds - 1 end
            if role == 'u' then rounds = rounds + 1 end
            replaced[#replaced + 1] = {known, role, ARGV[7 + index]}
        end
    end
end
local is_repeated = compares and index > 0 and #new + #replaced == 0  -- all is stored already, equal
if not is_expected and not is_repeated then return {'CHANGED', revision} end
if duplicate then return {'DUPLICATE', duplicate} end

local updated_at, result = changed_at(microseconds), #new + #replaced
if is_new and #new == 0 then return 0 end
if result > 0 then
""",
    f"""
    if #new > 0 then
        redis.call('APPEND', times, string.rep(string.format('%0{TIME_LENGTH}.0f', microseconds), #new))
        redis.call('APPEND', roles, table.concat(new_roles))
    end
    for first = 1, #new, 1000 do  -- Lua's stack may not hold more arguments
        local last = math.min(first + 999, #new)
        redis.call('RPUSH', contents, unpack(new, first, last))
        redis.call('HSET', message_ids, unpack(new_ids, 2 * first - 1, 2 * last))
    end
    for _, each in ipairs(replaced) do
        redis.call('LSET', contents, each[1], each[3])
        redis.call('SETRANGE', roles, each[1], each[2])
        remove_documents(history, tonumber(each[1]), tonumber(each[1]))
        unindex(chat_history_id, each[1])
    end
    if #new > 0 then unindex(chat_history_id, position) end
    revision = next_revision
    redis.call('HSET', history, 'next_position', position + #new, 'message_count', message_count + #new,
        'round_count', round_count + rounds, 'updated_at', updated_at, 'revision', revision)
    if is_new then
        redis.call('HSET', history, 'chat_history_id', chat_history_id, 'created_at', microseconds)
        if user ~= '' then
            redis.call('HSET', history, 'user_id', user)
            owner = user
        end
    end
    if #replaced > 0 then redis.call('HINCRBY', history, 'edits', 1) end
    if #new == index then
        local preview, last_role, last_text = ARGV[#ARGV - 3], ARGV[#ARGV - 2], ARGV[#ARGV - 1]
        if preview ~= '' then redis.call('HSETNX', history, 'preview', preview) end
        if last_role ~= '' then
            redis.call('HSET', history, 'last_role', last_role, 'last_text', last_text, 'last_at', microseconds)
        end
    else
        find_previews()
    end
    {LIST_HISTORY}
    {REMEMBER_CALL}
    {EXPIRE}
end
return result
""",
)

# Returns the position at which the last `wanted` messages begin for which a condition holds, or 0 if there are fewer.
_WALK_BACK = """
local function walk_back(unseen, wanted)
    while unseen > 0 and wanted > 0 do
        local first = math.max(unseen - 1000, 0)
        local part = redis.call('GETRANGE', roles, first, unseen - 1)
        for index = #part, 1, -1 do
            if string.byte(part, index) {condition} then
                wanted = wanted - 1
                if wanted == 0 then return first + index - 1 end
            end
        end
        unseen = first
    end
    return 0
end
"""
_TO_USER_MESSAGE = _WALK_BACK.format(condition="== 117")  # u
_TO_MESSAGE = _WALK_BACK.format(condition="~= 120")  # x, which stands for a message that was deleted

_BEGIN_READING = """
local length = position
local count, step, start = tonumber(ARGV[1]), tonumber(ARGV[2]), 0
local function size_of(total) return count + math.max(total - count, 0) % step end
local size = 0
"""

#: Stands between contents that are returned as one text. JSON text cannot have it.
SEPARATOR = "\x1e"
# redis-py takes much longer for a hundred texts than for one that is as long.
_READ = f"""
local window = redis.call('LRANGE', contents, start, -1)
if message_count ~= length then
    local found = window
    window = {{}}
    for _, content in ipairs(found) do
        if content ~= '' then window[#window + 1] = content end
    end
end
local texts = {{}}
for first = 1, #window, 100 do
    texts[#texts + 1] = table.concat(window, '\\{ord(SEPARATOR)}', first, math.min(first + 99, #window))
end
return {{size, revision, round_count, texts}}
"""

# The keys of the three scripts that follow: the bucket's schema version, those of the history. Arguments: the window's
# count and step; the user. They return the window's size, the history's revision and number of rounds, the contents:
# up to a hundred in one text.
_OF_READ = OF_HISTORY + if_absent("{0, 0, 0, {}}")

#: Return the whole history.
READ_ALL = Script(_OF_READ, _BEGIN_READING, _READ)

#: Return the last rounds: walk back over the roles to the user message that begins the first of them.
READ_ROUNDS = Script(
    _OF_READ,
    _BEGIN_READING,
    _TO_USER_MESSAGE,
    """
size = size_of(round_count)
start = walk_back(length, size)
""",
    _READ,
)

#: Return the last messages. If they begin with tool messages, go back to the message that made the calls.
READ_MESSAGES = Script(
    _OF_READ,
    _BEGIN_READING,
    _TO_MESSAGE,
    """
size = size_of(message_count)
start = message_count == length and math.max(length - size, 0) or walk_back(length, size)
while start > 0 and string.find(redis.call('GETRANGE', roles, start, start), '[tx]') do start = start - 1 end
""",
    _READ,
)

#: Return the number of messages. Keys: the bucket's schema version, those of the history. Argument: the user.
COUNT = Script(OF_HISTORY, if_absent("0"), " return message_count")

#: The state of the messages of a history, which each edit changes: its time of creation, its number of edits, its user.
STATE_OF_MESSAGES: Final = """
local edits = redis.call('HGET', history, 'edits') or '0'
local state = is_new and '' or table.concat({created_at, edits, owner and '=' .. owner or ''}, ' ')
"""

#: Finds up to `limit` messages from `first` to `last`, and the state of the history.
PAGE_FROM: Final = f"""
local found = {{}}
while first <= last and limit > 0 do
    local stop = math.min(first + limit - 1, first + 999, last)
    local letters = redis.call('GETRANGE', roles, first, stop)
    if string.find(letters, '[^x]') then
        local some = redis.call('LRANGE', contents, first, stop)
        local their_times = redis.call('GETRANGE', times, {TIME_LENGTH} * first, {TIME_LENGTH} * (stop + 1) - 1)
        for index, content in ipairs(some) do
            local letter = string.sub(letters, index, index)
            if letter ~= 'x' then
                local time = string.sub(their_times, {TIME_LENGTH} * (index - 1) + 1, {TIME_LENGTH} * index)
                for _, each in ipairs({{first + index - 1, letter, time, content}}) do found[#found + 1] = each end
                limit = limit - 1
            end
        end
    end
    first = stop + 1
end
{STATE_OF_MESSAGES}
"""

#: Return a page. Keys: the bucket's schema version, those of the history. Arguments: a position after which the page
#: begins, or nothing; a position before which it ends; the most messages of the page; the user. Returns the state of
#: the history, which each edit changes: its time of creation, its number of edits and its user; its user; its next
#: position; and of each message, in turn, its position, the letter of its role, its time and its content.
PAGE = Script(
    OF_HISTORY,
    if_absent("{'', false, 0, {}}"),
    _TO_MESSAGE,
    """
local after, last, limit = tonumber(ARGV[1]), math.min(ARGV[2], position) - 1, tonumber(ARGV[3])
local first = after and after + 1 or walk_back(last + 1, limit)
""",
    PAGE_FROM,
    "return {state, owner, position, found}",
)

#: Return the position of a message. Keys: the bucket's schema version, those of the history. Arguments: its id; the
#: user.
POSITION = Script(OF_HISTORY, if_absent("false"), " return redis.call('HGET', message_ids, ARGV[1])")

#: Return some ids of messages and their positions. Keys: the bucket's schema version, the history's hash, its message
#: ids. Arguments: the cursor, 0 at first; the user. Returns the next cursor, 0 at the end, then ids and positions in
#: turn.
SCAN_IDS = Script("""
if ARGV[2] ~= '' and redis.call('HGET', KEYS[2], 'user_id') ~= ARGV[2] then return {'0', {}} end
return redis.call('HSCAN', KEYS[3], ARGV[1], 'COUNT', 1000)
""")

# Finds the messages to delete among those with some ids: the ones from `start` on. Refuses a damaged history.
_FIND_GONE = """
local gone, gone_ids, gone_rounds = {}, {}, 0
for message_id in string.gmatch(ARGV[5], '%Z+') do
    local known = redis.call('HGET', message_ids, message_id)
    if known and not gone[known] and tonumber(known) >= start then
        local was = redis.call('GETRANGE', roles, known, known)
        if was == '' or was == 'x' then return redis.error_reply('DAMAGED ' .. history) end
        if was == 'u' then gone_rounds = gone_rounds + 1 end
        gone[known] = true
        gone_ids[#gone_ids + 1] = message_id
    end
end
"""
# All of them must be known by their ids. Others are there if the history was deleted and has begun anew meanwhile.
_CHECK_ALL_ARE_GONE = """
if start >= position then return redis.error_reply('DAMAGED ' .. history) end
local _, following = string.gsub(redis.call('GETRANGE', roles, start, -1), '[^x]', '')
if #gone_ids ~= following then return {'OTHERS'} end
"""
_DELETE_IDS = """
for first = 1, #gone_ids, 1000 do  -- a command that Redis takes when it is out of memory
    redis.call('HDEL', message_ids, unpack(gone_ids, first, math.min(first + 999, #gone_ids)))
end
"""
# Leaves gaps from `start` on, all at once: ten times as fast as finding each of them in a long list.
_LEAVE_GAPS = """
redis.call('LTRIM', contents, 0, start)
redis.call('LSET', contents, start, '')
local gaps = {}
for index = 1, 1000 do gaps[index] = '' end
for first = start + 1, position - 1, 1000 do
    redis.call('RPUSH', contents, unpack(gaps, 1, math.min(position - first, 1000)))
end
redis.call('SETRANGE', roles, start, string.rep('x', position - start))
remove_documents(history, start, position - 1)
"""

#: Delete single messages. Keys: those of the bucket, those of the history. Arguments: the history's id; the id of a
#: message that must exist and is deleted with all that follow it, or nothing; the next position that the history must
#: have, or nothing; a name for this call; the ids, separated by NUL; the revision that the history must have, or
#: nothing; the user. Returns how many were deleted, or the reason why none were: ACCESS, CHANGED and the history's
#: revision, MISSING, MORE or OTHERS.
REMOVE = Script(
    "local call = ARGV[4]",
    ONCE,
    OF_BUCKET_AND_HISTORY,
    NOW,
    CHANGED_AT,
    FIND_PREVIEWS,
    f"""
local chat_history_id, required, expected = ARGV[1], ARGV[2], ARGV[3]
local is_expected = ARGV[6] == '' or tonumber(ARGV[6]) == revision
if required ~= '' and not is_expected then return {{'CHANGED', revision}} end
local start = required == '' and 0 or tonumber(redis.call('HGET', message_ids, required) or nil)
if not start then return {{'MISSING'}} end
if expected ~= '' and tonumber(expected) ~= position then return {{'MORE'}} end
{_FIND_GONE}
if #gone_ids == 0 then return 0 end
if not is_expected then return {{'CHANGED', revision}} end
if required ~= '' then
    {_CHECK_ALL_ARE_GONE}
end

{_DELETE_IDS}
if required ~= '' then
    {_LEAVE_GAPS}
else
    for known in pairs(gone) do
        remove_documents(history, tonumber(known), tonumber(known))
        redis.call('LSET', contents, known, '')
        redis.call('SETRANGE', roles, known, 'x')
    end
end
local updated_at, result = changed_at(microseconds), #gone_ids
revision = next_revision
redis.call('HSET', history, 'message_count', message_count - #gone_ids,
    'round_count', round_count - gone_rounds, 'updated_at', updated_at, 'revision', revision)
redis.call('HINCRBY', history, 'edits', 1)
find_previews()
{LIST_HISTORY}
{REMEMBER_CALL}
{KEEP_REVISION}
if expiring > 0 then
    {AGE_BUCKET}
end
return result
""",
)

#: Delete a message and all that follow it, and append others. Keys: those of the bucket, those of the history.
#: Arguments: the history's id; the id of the first message to delete; the next position that the history must have; a
#: name for this call; the ids to delete, separated by NUL; the revision that the history must have, or nothing;
#: milliseconds until it expires, 0 for never; of the messages to append, the first letter of each role and the ids,
#: separated by NUL, then the contents, each an argument; the user. Returns how many were appended, 0 if an earlier
#: attempt has appended them, or the reason why nothing was changed: ACCESS, CHANGED and the history's revision,
#: MISSING, MORE or OTHERS.
REPLACE = Script(
    "local call = ARGV[4]",
    ONCE,
    OF_BUCKET_AND_HISTORY,
    NOW,
    CHANGED_AT,
    FIND_PREVIEWS,
    """
local chat_history_id, ttl = ARGV[1], tonumber(ARGV[7])
local start = tonumber(redis.call('HGET', message_ids, ARGV[2]) or nil)

local rounds, new, new_roles, new_ids = 0, {}, {}, {}
local index, equal_positions, is_repeated = 0, {}, true
for message_id in string.gmatch(ARGV[9], '%Z+') do
    index = index + 1
    local role, content = string.sub(ARGV[8], index, index), ARGV[9 + index]
    local known = tonumber(redis.call('HGET', message_ids, message_id) or nil)
    is_repeated = is_repeated and known and known >= (equal_positions[index - 1] or 0)
        and redis.call('GETRANGE', roles, known, known) == role and redis.call('LINDEX', contents, known) == content
    equal_positions[index] = known
    if not known or start and known >= start then
        new[#new + 1] = content
        new_roles[#new] = role
        new_ids[2 * #new - 1], new_ids[2 * #new] = message_id, position + #new - 1
        if role == 'u' then rounds = rounds + 1 end
    end
end
if is_repeated and index > 0 then
    local first, own = start or equal_positions[index], 0
    for _, each in ipairs(equal_positions) do
        if each >= first then own = own + 1 end
    end
    local _, following = string.gsub(redis.call('GETRANGE', roles, first, -1), '[^x]', '')
    if own == following then return 0 end
end
if ARGV[6] ~= '' and tonumber(ARGV[6]) ~= revision then return {'CHANGED', revision} end
if not start then return {'MISSING'} end
if tonumber(ARGV[3]) ~= position then return {'MORE'} end
""",
    _FIND_GONE,
    _CHECK_ALL_ARE_GONE,
    f"""
if #new > 0 then
    redis.call('APPEND', times, string.rep(string.format('%0{TIME_LENGTH}.0f', microseconds), #new))
    redis.call('APPEND', roles, table.concat(new_roles))
end
{_DELETE_IDS}
{_LEAVE_GAPS}
for first = 1, #new, 1000 do  -- Lua's stack may not hold more arguments
    local last = math.min(first + 999, #new)
    redis.call('RPUSH', contents, unpack(new, first, last))
    redis.call('HSET', message_ids, unpack(new_ids, 2 * first - 1, 2 * last))
end
if #new > 0 then unindex(chat_history_id, position) end
local updated_at, result = changed_at(microseconds), #new
revision = next_revision
redis.call('HSET', history, 'next_position', position + #new, 'message_count', message_count - #gone_ids + #new,
    'round_count', round_count - gone_rounds + rounds, 'updated_at', updated_at, 'revision', revision)
redis.call('HINCRBY', history, 'edits', 1)
find_previews()
{LIST_HISTORY}
{REMEMBER_CALL}
""",
    EXPIRE,
    "return result",
)

#: Change the content of a message, but not what was said. Keys: those of the bucket, those of the history. Arguments:
#: the message's id; its position; its content; the new content; a name for this call; whether its words change, 1 or 0;
#: the user. Returns 1, or why it was not changed: ACCESS, or OTHERS if the history does not have this message with this
#: content any more.
SET_CONTENT = Script(
    "local call = ARGV[5]",
    ONCE,
    OF_BUCKET_AND_HISTORY,
    f"""
if redis.call('HGET', message_ids, ARGV[1]) ~= ARGV[2] or redis.call('LINDEX', contents, ARGV[2]) ~= ARGV[3] then
    return {{'OTHERS', ''}}
end
redis.call('LSET', contents, ARGV[2], ARGV[4])
if ARGV[6] == '1' then
    remove_documents(history, tonumber(ARGV[2]), tonumber(ARGV[2]))
    unindex(redis.call('HGET', history, 'chat_history_id'), ARGV[2])
end
local result = 1
revision = next_revision
redis.call('HSET', history, 'revision', revision)
redis.call('HINCRBY', history, 'edits', 1)
{REMEMBER_CALL}
{KEEP_REVISION}
return result
""",
)

#: Let the lifetime of a history begin anew, if it expires. Keys: those of the bucket, those of the history. Arguments:
#: the history's id; milliseconds until it expires; the user.
RENEW = Script(
    OF_BUCKET_AND_HISTORY,
    NOW,
    f"""
local chat_history_id = ARGV[1]
if is_new or not expires_at then return 0 end
expires_at = string.format('%.0f', milliseconds + ARGV[2])
{SET_EXPIRY}
{AGE_BUCKET}
return 1
""",
)
