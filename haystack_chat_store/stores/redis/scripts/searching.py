# SPDX-License-Identifier: Apache-2.0
"""The scripts that index messages, and read what a search has found."""

from typing import Final

from haystack_chat_store.stores.redis.schema import TERMS_VERSION, TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import OF_BUCKET, OF_BUCKET_AND_HISTORY, OF_HISTORY, Script
from haystack_chat_store.stores.redis.scripts.messages import PAGE_FROM, STATE_OF_MESSAGES

#: What the script INDEX returns if the history has no more to index.
ALL_INDEXED: Final = 2

#: Turn search on in a bucket. Keys: those of the bucket. Argument: whether also if it has histories, 1 or 0: all their
#: messages are then to be indexed, also if an earlier version has indexed them.
TURN_ON = Script(
    OF_BUCKET,
    f"""
local terms_version = tonumber(redis.call('GET', bucket .. ':search') or 0)
if terms_version >= {TERMS_VERSION} then return 0 end
if redis.call('EXISTS', directory) == 1 then
    if ARGV[1] == '0' then return 0 end
    redis.call('ZUNIONSTORE', unindexed, 1, names)
    local remaining = redis.call('PTTL', directory)
    if remaining > 0 then redis.call('PEXPIRE', unindexed, remaining) end
end
redis.call('SET', bucket .. ':search', {TERMS_VERSION})
return 1
""",
)

#: Return what is not indexed. Keys: the schema versions of buckets. Argument: how many histories of each. Returns, of
#: each bucket, the version of the terms, or nothing where search is not on; 1 if it has histories; and histories with
#: the first position of their messages that are not indexed, in turn.
UNINDEXED = Script("""
local found = {}
for index, key in ipairs(KEYS) do
    local bucket = string.sub(key, 1, -16)
    found[index] = {
        redis.call('GET', bucket .. ':search') or '',
        redis.call('EXISTS', bucket .. ':histories'),
        redis.call('ZRANGE', bucket .. ':unindexed', 0, ARGV[1] - 1, 'WITHSCORES'),
    }
end
return found
""")

#: Return messages of a history that are not indexed. Keys: the bucket's schema version, those of the history.
#: Arguments: its id; how many; nothing. Returns the position from which on they are not indexed, or nothing; and what
#: PAGE returns.
NEXT_UNINDEXED = Script(
    OF_HISTORY,
    """
local start = redis.call('ZSCORE', string.sub(KEYS[1], 1, -16) .. ':unindexed', ARGV[1])
if not start then return {'', '', false, 0, {}} end
local first, last, limit = tonumber(start), position - 1, tonumber(ARGV[2])
""",
    PAGE_FROM,
    "return {start, state, owner, position, found}",
)

#: Index messages of a history, if they are as they were read. Keys: those of the bucket, those of the history.
#: Arguments: its id; from which position on it was not indexed; its state; from which position on it is not indexed
#: then; the tags of its id and of its user; then positions, sizes and tags of terms, in turn; nothing. Returns 1, or
#: ALL_INDEXED if the history has no more to index, or 0 if it has changed, or -1 if another version of this package
#: makes the terms.
INDEX = Script(
    OF_BUCKET_AND_HISTORY,
    STATE_OF_MESSAGES,
    f"""
local chat_history_id = ARGV[1]
if redis.call('GET', bucket .. ':search') ~= '{TERMS_VERSION}' then return -1 end
if redis.call('ZSCORE', unindexed, chat_history_id) ~= ARGV[2] or state ~= ARGV[3] then return 0 end
for index = 7, #ARGV - 1, 3 do
    local key = document(history, ARGV[index])
    redis.call('HSET', key, 'history', ARGV[5], 'user', ARGV[6], 'size', ARGV[index + 1], 'terms', ARGV[index + 2])
    if expires_at then redis.call('PEXPIREAT', key, expires_at) end
end
if tonumber(ARGV[4]) < position then
    redis.call('ZADD', unindexed, ARGV[4], chat_history_id)
    return 1
end
redis.call('ZREM', unindexed, chat_history_id)
return {ALL_INDEXED}
""",
)

#: Have a history indexed anew. Keys: those of the bucket. Arguments: its id; then keys of words to remove. It is not
#: called on a cluster.
REINDEX = Script(
    OF_BUCKET,
    """
for index = 2, #ARGV do redis.call('UNLINK', ARGV[index]) end
unindex(ARGV[1], 0)
""",
)

#: Return messages. Keys: the bucket's schema version, then the hash, the contents, the roles and the times of each
#: history. Arguments: of each history, how many positions follow, and these; the user. Returns, of each position, the
#: letter of the role, the time and the content: empty texts if there is no message, or the history is another user's.
READ_PLACES = Script(f"""
local found, at, user = {{}}, 1, ARGV[#ARGV]
for index = 1, (#KEYS - 1) / 4 do
    local history, contents, roles, times = unpack(KEYS, 4 * index - 2, 4 * index + 1)
    local is_seen = user == '' or redis.call('HGET', history, 'user_id') == user
    for each = at + 1, at + ARGV[at] do
        local position, letter, time, content = tonumber(ARGV[each]), '', '', ''
        if is_seen then
            letter = redis.call('GETRANGE', roles, position, position)
            time = redis.call('GETRANGE', times, {TIME_LENGTH} * position, {TIME_LENGTH} * (position + 1) - 1)
            content = redis.call('LINDEX', contents, position) or ''
        end
        for _, part in ipairs({{letter, time, content}}) do found[#found + 1] = part end
    end
    at = at + ARGV[at] + 1
end
return found
""")

#: Return the words that are kept of messages. Keys: the bucket's schema version, then those of words. Returns, of each,
#: the tags of the history and of the user, the size and the tags of terms, as one text, or nothing.
DOCUMENTS = Script("""
local found = {}
for index = 2, #KEYS do
    local fields = redis.call('HMGET', KEYS[index], 'history', 'user', 'size', 'terms')
    for part = 1, 4 do fields[part] = fields[part] or '' end
    found[index - 1] = table.concat(fields, ' ')
end
return found
""")

#: Return the titles of some histories of a bucket. Keys: those of the bucket. Arguments: the ends of the range of ids,
#: as ZRANGEBYLEX takes them; how many ids; the user. Returns the id to go on from, or nothing at the end; then ids and
#: titles in turn.
TITLES = Script(
    OF_BUCKET,
    """
local function encoded(byte) return string.format('%%%02X', string.byte(byte)) end
local seen, found = redis.call('ZRANGEBYLEX', names, ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3]), {}
for _, chat_history_id in ipairs(seen) do
    local history = bucket .. ':' .. string.gsub(chat_history_id, '[^%w_.~-]', encoded) .. ':history'
    local fields = redis.call('HMGET', history, 'title', 'user_id')
    if fields[1] and (ARGV[4] == '' or fields[2] == ARGV[4]) then
        found[#found + 1], found[#found + 2] = chat_history_id, fields[1]
    end
end
return {#seen < tonumber(ARGV[3]) and '' or seen[#seen], found}
""",
)
