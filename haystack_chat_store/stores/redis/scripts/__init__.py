# SPDX-License-Identifier: Apache-2.0
"""
The Lua scripts that the server runs, so that each call is atomic and takes one round trip. Here are their shared parts.

Redis does not undo what a script has done before it fails. So everything that can fail comes before the first write:
the script looks at all keys, which shows those that hold something else. The first write is a command that Redis
refuses when it is out of memory, is a replica, or takes no more messages into a history (APPEND to the times, beyond
proto-max-bulk-len). After that, Redis refuses no command of the script.
"""

import hashlib
from typing import Final

from haystack_chat_store.stores.previews import PREVIEW_LENGTH
from haystack_chat_store.stores.redis.schema import SCHEMA_VERSION, TIME_LENGTH


class Script:
    """A Lua script, and the digest by which a server knows it once it has run it."""

    def __init__(self, *parts: str) -> None:
        """
        Make a script that leaves a bucket of a newer schema version untouched.

        :param parts: The script. Its first key is the bucket's schema version.
        """
        self.text = "".join((_CHECK_SCHEMA_VERSION, *parts))
        #: Whether it makes the names of some of its keys.
        self.names_keys = OF_BUCKET in self.text
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_CHECK_SCHEMA_VERSION: Final = f"""
local version = redis.call('GET', KEYS[1])
if version and tonumber(version) > {SCHEMA_VERSION} then
    return redis.error_reply('NEWERSCHEMA ' .. version)
end
"""

#: The fields of a history's hash that describe it.
INFO: Final = """'message_count', 'round_count', 'created_at', 'updated_at', 'title', 'meta', 'next_position',
    'revision', 'user_id', 'preview', 'last_role', 'last_text', 'last_at', 'expires_at',
    'renamed_from', 'renaming'"""

#: The state of a history's hash, which differs after each change of the history. That it takes part in a renaming, and
#: which calls it remembers, does not count.
STATE_OF: Final = f"""
local function state_of(history)
    local parts = redis.call('HMGET', history, 'edits', {INFO})
    for index, value in ipairs(parts) do parts[index] = value and #value .. ':' .. value or '-' end
    return redis.sha1hex(table.concat(parts, '', 1, #parts - 2))
end
"""

#: Reads which renaming has claimed a history: since when, the name of the messages that wait for it, and the new id.
CLAIM_OF: Final = """
local function claim_of(history)
    local claim = redis.call('HGET', history, 'claim') or ''
    local since, stage, new_id = string.match(claim, '^(%d+) (%x+) (.*)$')
    return since or '0', stage or '', new_id or ''
end
"""

#: Names the keys of a bucket.
OF_BUCKET: Final = """
local schema_version, directory, expiries, names, deleted_revision, owners = unpack(KEYS)
local bucket = string.sub(schema_version, 1, -16)
local origins = bucket .. ':origins'
local function users_key(user) return bucket .. ':users::' .. user end

-- Where search is on: the histories whose messages are not indexed, each with the first position of these.
local is_searched, unindexed = redis.call('EXISTS', bucket .. ':search') == 1, bucket .. ':unindexed'
local function unindex(chat_history_id, position)
    if is_searched then redis.call('ZADD', unindexed, 'LT', position, chat_history_id) end
end
local function document(history, position)
    return 'terms' .. string.sub(history, 1, -8) .. string.format('%.0f', position)
end
local function remove_documents(history, first, last)
    for start = first, is_searched and last or -1, 1000 do
        local gone = {}
        for position = start, math.min(start + 999, last) do gone[#gone + 1] = document(history, position) end
        redis.call('UNLINK', unpack(gone))
    end
end
"""

# {of_another} is what a script does with a history of another user. The last argument is the user, or nothing for all.
_READ_COUNTERS = f"""
local fields = redis.call('HMGET', history, 'next_position', 'message_count', 'round_count', 'expires_at',
    'created_at', 'updated_at', 'revision', 'user_id')
local user, owner, is_absent = ARGV[#ARGV], fields[8], false
if user ~= '' and fields[5] and owner ~= user then {{of_another}} end
local position, message_count = tonumber(fields[1] or 0), tonumber(fields[2] or 0)
local round_count = tonumber(fields[3] or 0)
local expires_at, created_at, last_updated_at, is_new = fields[4], fields[5], fields[6], not fields[5]
local revision = is_new and 0 or tonumber(fields[7] or nil)
-- Another program may have changed a part of the history, or the server may have evicted it.
if not round_count or not revision
        or redis.call('LLEN', contents) ~= position or redis.call('STRLEN', roles) ~= position
        or redis.call('STRLEN', times) ~= {TIME_LENGTH} * (position or 0)
        or redis.call('HLEN', message_ids) ~= message_count then
    return redis.error_reply('DAMAGED ' .. history)
end
"""

#: Names the keys of a bucket and of one of its histories. Refuses a damaged history.
OF_BUCKET_AND_HISTORY: Final = f"""
{OF_BUCKET}
local history, contents, roles, message_ids, times = unpack(KEYS, 7)
{_READ_COUNTERS.format(of_another="return {'ACCESS', ''}")}
local kept_revision = tonumber(redis.call('GET', deleted_revision) or 0)
local next_revision = (is_new and kept_revision or revision) + 1
redis.call('ZCARD', directory)
if is_new then redis.call('ZCARD', names) end
local expiring = redis.call('ZCARD', expiries)
"""

#: Names the keys of a history, after that of the bucket's schema version. Refuses a damaged history. A history of
#: another user `is_absent`: see `if_absent`.
OF_HISTORY: Final = f"""
local _, history, contents, roles, message_ids, times = unpack(KEYS)
{_READ_COUNTERS.format(of_another="is_absent = true")}
"""


def if_absent(answer: str) -> str:
    """Return the part of a script that answers for a history of another user."""
    return f"if is_absent then return {answer} end"


#: Finds the first question and the last message of a history anew, as `previews` does.
FIND_PREVIEWS: Final = r"""
local function beginning_of(content)
    local is_read, message = pcall(cjson.decode, content)
    if not is_read then  -- it may have lone surrogates
        is_read, message = pcall(cjson.decode, (string.gsub(content, '\\u[dD][89a-fA-F]%x%x', '\\ufffd')))
    end
    if not is_read or type(message) ~= 'table' or type(message.content) ~= 'table' then return '' end
    for _, part in ipairs(message.content) do
        local text = type(part) == 'table' and part.text
        local result = type(part) == 'table' and part.tool_call_result
        if type(text) ~= 'string' and type(result) == 'table' then text = result.result end
        if type(text) == 'string' then
            text = string.gsub(text, '^[ \t\n\v\f\r]+', '')
            local characters = {}
            for character in string.gmatch(string.sub(text, 1, 4 * LENGTH), '[%z\1-\127\194-\244][\128-\191]*') do
                characters[#characters + 1] = character == '\0' and '\239\191\189' or character
                if #characters == LENGTH then break end
            end
            if #characters > 0 then return table.concat(characters) end
        end
    end
    return ''
end
local function find_previews()
    local letters, at, preview = redis.call('GETRANGE', roles, 0, -1), 0, ''
    repeat
        at = string.find(letters, 'u', at + 1, true)
        if at then preview = beginning_of(redis.call('LINDEX', contents, at - 1)) end
    until not at or preview ~= ''
    redis.call('HDEL', history, 'preview')
    if preview ~= '' then redis.call('HSET', history, 'preview', preview) end
    local last = string.match(letters, '^.*()[uat]')
    if not last then
        redis.call('HDEL', history, 'last_role', 'last_text', 'last_at')
    else
        redis.call('HSET', history, 'last_role', string.sub(letters, last, last),
            'last_text', beginning_of(redis.call('LINDEX', contents, last - 1)),
            'last_at', redis.call('GETRANGE', times, TIME_LENGTH * (last - 1), TIME_LENGTH * last - 1))
    end
end
""".replace("TIME_LENGTH", str(TIME_LENGTH)).replace("LENGTH", str(PREVIEW_LENGTH))

#: Reads the server's clock.
NOW: Final = """
local time = redis.call('TIME')
local milliseconds = time[1] * 1000 + math.floor(time[2] / 1000)
local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
"""

#: The time of a change: never before that of the last change, even if the server's clock was set back.
CHANGED_AT: Final = """
local function changed_at(time)
    return tonumber(last_updated_at or 0) > tonumber(time) and last_updated_at or time
end
"""

#: A call that is repeated because its answer was lost gets the result of its first attempt.
ONCE: Final = """
local known_calls = redis.call('HGET', KEYS[7], 'calls') or ''
local _, found_at = string.find(known_calls, call .. '=', 1, true)
if found_at then return tonumber(string.match(known_calls, '^%d+', found_at + 1)) end
"""

# About two hundred calls: so many others may come between the two attempts of a call.
_CALLS_LENGTH = 4000

#: What follows a change of a history's messages.
LIST_HISTORY: Final = f"""
redis.call('ZADD', directory, updated_at, chat_history_id)
if is_new then
    redis.call('ZADD', names, 0, chat_history_id)
    local expired_user = redis.call('HGET', owners, chat_history_id)  -- of a history with this id, which has expired
    if expired_user then
        redis.call('ZREM', users_key(expired_user), chat_history_id)
        redis.call('HDEL', owners, chat_history_id)
    end
end
if owner then
    redis.call('ZADD', users_key(owner), updated_at, chat_history_id)
    if is_new then redis.call('HSET', owners, chat_history_id, owner) end
end
if not version then redis.call('SET', schema_version, {SCHEMA_VERSION}) end
"""

#: Remembers the result of a call in its history.
REMEMBER_CALL: Final = f"""
local calls = call .. '=' .. string.format('%.0f', result) .. ' ' .. known_calls
redis.call('HSET', history, 'calls', string.sub(calls, 1, {_CALLS_LENGTH}))
"""

#: What follows a write or a deletion in a bucket that has histories which expire.
AGE_BUCKET: Final = """
-- Expired histories leave the directory, some at a time, so that no call takes long.
local expired = redis.call('ZRANGEBYSCORE', expiries, '-inf', '(' .. string.format('%.0f', milliseconds),
    'LIMIT', 0, 100)
if #expired > 0 then
    for _, key in ipairs({expiries, directory, names, unindexed}) do redis.call('ZREM', key, unpack(expired)) end
    for _, each in ipairs(expired) do
        local their_user = redis.call('HGET', owners, each)
        if their_user then
            redis.call('ZREM', users_key(their_user), each)
            redis.call('HDEL', owners, each)
        end
    end
end
-- If all histories of the bucket expire, its own keys expire with the last of them. An end never becomes earlier. So
-- only the first one has to be set for the directories of all users.
local last = tonumber(redis.call('ZREVRANGE', expiries, 0, 0, 'WITHSCORES')[2] or nil)
local has_end = last and redis.call('ZCARD', expiries) == redis.call('ZCARD', directory)
local remaining = redis.call('PTTL', directory)
local bucket_end = has_end and string.format('%.0f', math.max(last, milliseconds + remaining))
local own_keys = {schema_version, directory, expiries, names, owners, origins, unindexed}
if owner then own_keys[#own_keys + 1] = users_key(owner) end
if has_end and remaining < 0 then
    for _, each in ipairs(redis.call('HVALS', owners)) do own_keys[#own_keys + 1] = users_key(each) end
end
for _, key in ipairs(own_keys) do
    if has_end then redis.call('PEXPIREAT', key, bucket_end) else redis.call('PERSIST', key) end
end
"""

#: Has a history expire at `expires_at`, or never if that is false.
SET_EXPIRY: Final = """
if is_searched and (expires_at or redis.call('HEXISTS', history, 'expires_at') == 1) then
    for each = 0, redis.call('STRLEN', roles) - 1 do
        local key = document(history, each)
        if expires_at then redis.call('PEXPIREAT', key, expires_at) else redis.call('PERSIST', key) end
    end
end
for _, key in ipairs({history, contents, roles, message_ids, times}) do
    if expires_at then redis.call('PEXPIREAT', key, expires_at) else redis.call('PERSIST', key) end
end
if expires_at then
    redis.call('HSET', history, 'expires_at', expires_at)
    redis.call('ZADD', expiries, expires_at, chat_history_id)
else
    redis.call('HDEL', history, 'expires_at')
    redis.call('ZREM', expiries, chat_history_id)
end
"""

#: Keeps the revision of a history that is to expire, because no script runs when it does.
KEEP_REVISION: Final = """
if expires_at and revision > kept_revision then redis.call('SET', deleted_revision, revision) end
"""

#: What comes last in a write: the time until the history expires starts anew.
EXPIRE: Final = f"""
if ttl > 0 or expires_at or is_new then
    expires_at = ttl > 0 and string.format('%.0f', milliseconds + ttl)
    {SET_EXPIRY}
    {KEEP_REVISION}
end
if ttl > 0 or expiring > 0 then
    {AGE_BUCKET}
end
"""
