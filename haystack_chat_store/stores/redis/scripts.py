# SPDX-License-Identifier: Apache-2.0
"""
What the server runs: one Lua script for each operation, so that each is atomic and takes one round trip.

Redis does not undo what a script has done before it failed. So whatever can fail is done before the first write: all
keys are looked at, which shows those that hold something else, and what comes first among the writes is a command that
Redis refuses when it is out of memory, may not be written to, or takes no more messages into a history (APPEND, beyond
proto-max-bulk-len). After that it refuses none of the script.
"""

import hashlib

#: The version of how histories are kept. It is recorded in every bucket.
SCHEMA_VERSION = 1


class Script:
    """
    A Lua script, and the digest by which a server knows it once it has run it.
    """

    def __init__(self, text: str) -> None:
        """
        Make a script that leaves a bucket of a newer schema version untouched.

        :param text: The script. Its first key is the bucket's schema version.
        """
        self.text = _CHECK_SCHEMA + text
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_CHECK_SCHEMA = f"""
local version = redis.call('GET', KEYS[1])
if version and tonumber(version) > {SCHEMA_VERSION} then
    return redis.error_reply('NEWERSCHEMA ' .. version)
end
"""

# A history of which something else has changed or evicted a part is neither written to nor taken for a whole one.
_CHECK_WHOLE = """
local counters = redis.call('HMGET', history, 'next_position', 'message_count', 'round_count', 'expires_at')
local position, message_count = tonumber(counters[1] or 0), tonumber(counters[2] or 0)
if redis.call('LLEN', contents) ~= position or redis.call('STRLEN', roles) ~= position
        or redis.call('HLEN', message_ids) ~= message_count then
    return redis.error_reply('DAMAGED')
end
"""

_NOW = """
local time = redis.call('TIME')
local milliseconds = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# What follows a write or a deletion in a bucket where something is to expire.
_AGE_BUCKET = """
-- Histories that have expired leave the directory; some at a time, so that no call takes long.
local expired = redis.call('ZRANGEBYSCORE', expiries, '-inf', '(' .. string.format('%.0f', milliseconds),
    'LIMIT', 0, 100)
if #expired > 0 then
    redis.call('ZREM', expiries, unpack(expired))
    redis.call('ZREM', directory, unpack(expired))
end
-- Where every history is to expire, the bucket does with the last of them.
local last = redis.call('ZREVRANGE', expiries, 0, 0, 'WITHSCORES')[2]
local has_end = last and redis.call('ZCARD', expiries) == redis.call('ZCARD', directory)
for key = 1, 3 do
    if has_end then redis.call('PEXPIREAT', KEYS[key], last) else redis.call('PERSIST', KEYS[key]) end
end
"""

#: Append messages. Keys: those of the bucket, those of the history. Arguments: the history's id; milliseconds until it
#: expires, 0 for never; the first letter of each message's role, as a capital if this call made up the message's id;
#: the messages' ids, separated by NUL; then their contents, each an argument. Returns how many this call has written.
WRITE = Script(f"""
local _, directory, expiries, history, contents, roles, message_ids = unpack(KEYS)
local chat_history_id, ttl, letters = ARGV[1], tonumber(ARGV[2]), ARGV[3]
{_CHECK_WHOLE}
redis.call('ZCARD', directory)
local expiring = redis.call('ZCARD', expiries)

local written_before, rounds, new, new_roles, new_ids = 0, 0, {{}}, {{}}, {{}}
local index = 0
for message_id in string.gmatch(ARGV[4], '%Z+') do
    index = index + 1
    local letter = string.sub(letters, index, index)
    local role = string.lower(letter)
    if redis.call('HEXISTS', message_ids, message_id) == 0 then
        new[#new + 1] = ARGV[4 + index]
        new_roles[#new] = role
        new_ids[2 * #new - 1], new_ids[2 * #new] = message_id, position + #new - 1
        if role == 'u' then rounds = rounds + 1 end
    elseif role ~= letter then
        written_before = written_before + 1  -- by an earlier attempt of this same call, whose answer was lost
    end
end

{_NOW}
local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
if #new > 0 then
    redis.call('APPEND', roles, table.concat(new_roles))
    for first = 1, #new, 1000 do  -- more arguments than that may not fit on Lua's stack
        local last = math.min(first + 999, #new)
        redis.call('RPUSH', contents, unpack(new, first, last))
        redis.call('HSET', message_ids, unpack(new_ids, 2 * first - 1, 2 * last))
    end
    redis.call('HSET', history, 'next_position', position + #new, 'message_count', message_count + #new,
        'round_count', tonumber(counters[3] or 0) + rounds, 'updated_at', microseconds)
    if position == 0 then
        redis.call('HSET', history, 'chat_history_id', chat_history_id, 'created_at', microseconds)
    end
    redis.call('ZADD', directory, microseconds, chat_history_id)
    if not version then redis.call('SET', KEYS[1], {SCHEMA_VERSION}) end
end

if ttl > 0 then
    local expires_at = string.format('%.0f', milliseconds + ttl)
    redis.call('HSET', history, 'expires_at', expires_at)
    for key = 4, 7 do redis.call('PEXPIREAT', KEYS[key], expires_at) end
    redis.call('ZADD', expiries, expires_at, chat_history_id)
elseif counters[4] or position == 0 then
    redis.call('HDEL', history, 'expires_at')
    redis.call('ZREM', expiries, chat_history_id)
    for key = 4, 7 do redis.call('PERSIST', KEYS[key]) end
end
if ttl > 0 or expiring > 0 then
    {_AGE_BUCKET}
end
return written_before + #new
""")

_OF_HISTORY = "local _, history, contents, roles, message_ids = unpack(KEYS)" + _CHECK_WHOLE

_READ = """
local length = position
local count, step, start = tonumber(ARGV[1]), tonumber(ARGV[2]), 0
local function size_of(total) return count + math.max(total - count, 0) % step end
local size = 0
{find_start}
if redis.REDIS_VERSION_NUM or start < length / 2 or length - start > 1000 then
    return {{size, redis.call('LRANGE', contents, start, -1)}}
end
local window = {{}}  -- Redis 6 finds the end of a long list slowly, but not for LINDEX
for index = start - length, -1 do window[#window + 1] = redis.call('LINDEX', contents, index) end
return {{size, window}}
"""

# Keys of the three: the bucket's schema version, those of the history. Arguments: the window's count and step. They
# return the window's size and the contents.

#: Return the whole history.
READ_ALL = Script(_OF_HISTORY + _READ.format(find_start=""))

#: Return the last rounds: walk back over the roles to the user message that begins the first of them.
READ_ROUNDS = Script(
    _OF_HISTORY
    + _READ.format(
        find_start="""
size = size_of(tonumber(counters[3] or 0))
local unseen, wanted = length, size
while unseen > 0 and wanted > 0 do
    local first = math.max(unseen - 1000, 0)
    local part = redis.call('GETRANGE', roles, first, unseen - 1)
    for index = #part, 1, -1 do
        if string.byte(part, index) == 117 then  -- u
            wanted = wanted - 1
            if wanted == 0 then
                start = first + index - 1
                break
            end
        end
    end
    unseen = first
end
"""
    )
)

#: Return the last messages, and where these begin with tool messages, what comes before up to one that is none.
READ_MESSAGES = Script(
    _OF_HISTORY
    + _READ.format(
        find_start="""
size = size_of(length)
start = math.max(length - size, 0)
while start > 0 and redis.call('GETRANGE', roles, start, start) == 't' do start = start - 1 end
"""
    )
)

#: Return the number of messages. Keys: the bucket's schema version, those of the history.
COUNT = Script(f"{_OF_HISTORY} return message_count")

#: Delete histories of a bucket. Keys: those of the bucket, then those of the histories. Arguments: the histories' ids.
DELETE = Script(f"""
local _, directory, expiries = unpack(KEYS)
redis.call('ZCARD', directory)
local expiring = redis.call('ZCARD', expiries)
redis.call('UNLINK', unpack(KEYS, 4))
redis.call('ZREM', directory, unpack(ARGV))
redis.call('ZREM', expiries, unpack(ARGV))
if expiring > 0 then
    {_NOW}
    {_AGE_BUCKET}
end
if redis.call('EXISTS', directory) == 0 then redis.call('UNLINK', KEYS[1]) end
""")

#: Return ids of histories to delete, when all that a bucket has are to be deleted in steps: first those that were not
#: written to for longest. The last step has all that are left, and with them those that a write has kept out of the
#: earlier ones. Keys: those of the bucket. Arguments: the time up to which histories were last written to, as the first
#: step returned it, and empty in the first step; how many ids a step has, but for the last. Returns that time, empty
#: after the last step, and the ids.
LIST = Script("""
local directory, until_time, count = KEYS[2], ARGV[1], tonumber(ARGV[2])
if until_time == '' then
    until_time = redis.call('ZREVRANGE', directory, 0, 0, 'WITHSCORES')[2] or ''
end
if redis.call('ZCARD', directory) == 0 or redis.call('ZCOUNT', directory, '-inf', until_time) <= count then
    return {'', redis.call('ZRANGE', directory, 0, -1)}
end
return {until_time, redis.call('ZRANGEBYSCORE', directory, '-inf', until_time, 'LIMIT', 0, count)}
""")
