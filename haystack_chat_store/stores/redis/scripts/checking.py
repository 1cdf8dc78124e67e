# SPDX-License-Identifier: Apache-2.0
"""The scripts that look at histories which may be damaged, and rebuild them."""

from haystack_chat_store.stores.redis.schema import TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import (
    AGE_BUCKET,
    FIND_PREVIEWS,
    KEEP_REVISION,
    LIST_HISTORY,
    NOW,
    OF_BUCKET,
    SET_EXPIRY,
    Script,
)
from haystack_chat_store.stores.redis.scripts.staging import TAKE_THE_PLACE

_KEYS = f"""
{OF_BUCKET}
local history, contents, roles, message_ids, times = unpack(KEYS, 7)
"""

_INSPECT = f"""
{NOW}
local function inspected(chat_history_id)
    local expires_at = redis.call('ZSCORE', expiries, chat_history_id)
    if expires_at and tonumber(expires_at) < milliseconds then return {{'expired'}} end
    local found = redis.call('HMGET', history, 'chat_history_id', 'next_position', 'message_count', 'round_count',
        'created_at', 'updated_at', 'expires_at', 'edits', 'revision')
    for index = 1, 9 do found[index] = found[index] or '' end
    found[10], found[11] = redis.call('LLEN', contents), redis.call('STRLEN', roles)
    found[12], found[13] = redis.call('HLEN', message_ids), redis.call('STRLEN', times)
    for index, list in ipairs({{directory, names, expiries}}) do
        found[13 + index] = redis.call('ZSCORE', list, chat_history_id) or ''
    end
    found[17] = 0
    for index = 1, 5 do
        if redis.call('PTTL', KEYS[6 + index]) >= 0 then found[17] = found[17] + 1 end
    end
    found[18] = redis.call('EXISTS', unpack(KEYS, 7, 11))
    found[19] = version or ''
    found[20] = redis.call('HGET', history, 'user_id') or ''
    found[21] = redis.call('HGET', owners, chat_history_id) or ''
    found[22] = found[21] ~= '' and redis.call('ZSCORE', users_key(found[21]), chat_history_id) or ''
    for index, field in ipairs({{'preview', 'last_role', 'last_text', 'last_at', 'meta'}}) do
        found[22 + index] = redis.call('HGET', history, field) or ''
    end
    found[28] = redis.call('SISMEMBER', origins, chat_history_id)
    return found
end
"""

#: Return all that is kept of a history, however damaged, except its messages. Keys: those of the bucket, those of the
#: history. Argument: its id. Returns a list of texts and numbers, or 'expired'.
INSPECT = Script(_KEYS, _INSPECT, "return inspected(ARGV[1])")

#: Return what stands at some positions. Keys: the bucket's schema version, those of the history. Arguments: the first
#: position and the last. Returns contents, letters of roles, times.
RAW = Script(f"""
local _, history, contents, roles, message_ids, times = unpack(KEYS)
local first, last = tonumber(ARGV[1]), tonumber(ARGV[2])
return {{
    redis.call('LRANGE', contents, first, last),
    redis.call('GETRANGE', roles, first, last),
    redis.call('GETRANGE', times, {TIME_LENGTH} * first, {TIME_LENGTH} * (last + 1) - 1),
}}
""")

#: Rebuild a history, if it is still as it was inspected. Keys: those of the bucket, of the history, of the messages
#: that wait to take the place of its own. Arguments: the history's id; what INSPECT returned, joined by blanks; when it
#: expires, or nothing; when it last changed; then what its hash is to hold, in turn names of fields and values. Without
#: fields, the history is only taken from all lists. Returns whether it was as it was inspected.
REBUILD = Script(
    _KEYS,
    _INSPECT,
    FIND_PREVIEWS,
    f"""
local chat_history_id, expires_at, updated_at, is_new = ARGV[1], ARGV[3] ~= '' and ARGV[3], ARGV[4], true
if table.concat(inspected(chat_history_id), ' ') ~= ARGV[2] then return 0 end
if #ARGV == 4 then
    for _, key in ipairs({{directory, names, expiries, unindexed}}) do redis.call('ZREM', key, chat_history_id) end
    local gone_user = redis.call('HGET', owners, chat_history_id)
    if gone_user then
        redis.call('ZREM', users_key(gone_user), chat_history_id)
        redis.call('HDEL', owners, chat_history_id)
    end
    return 1
end
redis.call('HSET', history, unpack(ARGV, 5))
redis.call('HINCRBY', history, 'edits', 1)
local kept_revision = tonumber(redis.call('GET', deleted_revision) or 0)
local revision = math.max(tonumber(redis.call('HGET', history, 'revision')), kept_revision) + 1
redis.call('HSET', history, 'revision', revision)
remove_documents(history, 0, redis.call('LLEN', contents) - 1)
unindex(chat_history_id, 0)
{TAKE_THE_PLACE}
find_previews()
local owner = redis.call('HGET', history, 'user_id')
{LIST_HISTORY}
{SET_EXPIRY}
{KEEP_REVISION}
{AGE_BUCKET}
return 1
""",
)
