# SPDX-License-Identifier: Apache-2.0
"""The scripts that find, describe and delete whole histories."""

from haystack_chat_store.stores.redis.schema import SCHEMA_VERSION, TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import (
    AGE_BUCKET,
    CLAIM_OF,
    INFO,
    KEEP_REVISION,
    LIST_HISTORY,
    NOW,
    OF_BUCKET,
    OF_BUCKET_AND_HISTORY,
    REMEMBER_CALL,
    SET_EXPIRY,
    STATE_OF,
    Script,
)

# Tells expired histories from others among the ids that a bucket lists. Reading changes nothing: they stay listed until
# a write, a deletion or a purge removes them.
_STILL_THERE = (
    NOW
    + """
local is_expiring = redis.call('ZCARD', expiries) > 0
local function is_still_there(chat_history_id)
    local expires_at = is_expiring and redis.call('ZSCORE', expiries, chat_history_id)
    return not expires_at or tonumber(expires_at) >= milliseconds
end
"""
)

# How many histories the server passes in the directory in the time in which it looks up one by its id, or more.
_PASSED_MEANWHILE = 5
# The most histories that a script looks up, so that other clients do not wait for long.
_LOOKED_UP = 5000
# How many bytes of replies a script returns, to be looked through for their token usage, or a little more.
_USAGE_SIZE = 4_000_000
#: For how long a history that a renaming has deleted is known to be renamed.
RENAMED_TO_MILLISECONDS = 600_000

#: Return the ids of histories of a bucket, the one that changed last first. Keys: those of the bucket. Arguments: a
#: prefix; the ends of its range, as ZRANGEBYLEX takes them; how many ids; the time and the id of a history to begin
#: after, or nothing; the user. Returns the place to go on from, a time and an id, or nothing at the end; then times and
#: ids in turn.
NEWEST = Script(
    OF_BUCKET,
    _STILL_THERE,
    f"""
local prefix, least, greatest, wanted = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time, chat_history_id = tonumber(ARGV[5]), ARGV[6]
local function is_greater(a, b)  -- by bytes: Lua compares by the rules of the locale
    for index = 1, math.min(#a, #b) do
        local left, right = string.byte(a, index), string.byte(b, index)
        if left ~= right then return left > right end
    end
    return #a > #b
end

local found = {{}}
if ARGV[7] ~= '' then directory = users_key(ARGV[7]) end
local total = redis.call('ZCARD', directory)
local matching = (prefix == '' or ARGV[7] ~= '') and total or redis.call('ZLEXCOUNT', names, least, greatest)
if matching == 0 then return {{'', '', found}} end

local rank = 0
if time then
    rank = redis.call('ZCOUNT', directory, '(' .. ARGV[5], '+inf')
    local beyond = rank + redis.call('ZCOUNT', directory, ARGV[5], ARGV[5])
    while rank < beyond do
        local middle = math.floor((rank + beyond) / 2)
        if is_greater(chat_history_id, redis.call('ZREVRANGE', directory, middle, middle)[1]) then
            beyond = middle
        else
            rank = middle + 1
        end
    end
end

-- Go through the directory for as long as looking up all matching histories would take. With most prefixes, the wanted
-- ones come soon. Scores are asked for only where they are needed: they take the server longer than the ids.
local stop = math.min(rank + {_PASSED_MEANWHILE} * math.min(matching, {_LOOKED_UP}), total)
local step, last = wanted, nil
while rank < stop and #found < 2 * wanted do
    for _, passed in ipairs(redis.call('ZREVRANGE', directory, rank, math.min(rank + step, stop) - 1)) do
        rank, last = rank + 1, passed
        if string.sub(passed, 1, #prefix) == prefix and is_still_there(passed) then
            found[#found + 1], found[#found + 2] = redis.call('ZSCORE', directory, passed), passed
            if #found == 2 * wanted then break end
        end
    end
    step = math.min(2 * step, 1000)
end
if rank == total or #found == 2 * wanted or matching > {_LOOKED_UP} then
    local last_time = rank < total and redis.call('ZSCORE', directory, last)
    return {{last_time or '', last_time and last or '', found}}
end

-- The matching histories are old, or few: look all of them up, and sort them.
local ids, all = redis.call('ZRANGEBYLEX', names, least, greatest), {{}}
for first = 1, #ids, 1000 do  -- Lua's stack may not hold more arguments
    local some = {{unpack(ids, first, math.min(first + 999, #ids))}}
    for index, score in ipairs(redis.call('ZMSCORE', directory, unpack(some))) do
        local score_number = tonumber(score or nil)
        if score_number and is_still_there(some[index]) and (not time or score_number < time
                or score_number == time and is_greater(chat_history_id, some[index])) then
            all[#all + 1] = {{score_number, some[index], score}}
        end
    end
end
table.sort(all, function(a, b) return a[1] > b[1] or a[1] == b[1] and is_greater(a[2], b[2]) end)
found = {{}}
for index = 1, math.min(wanted, #all) do
    found[2 * index - 1], found[2 * index] = all[index][3], all[index][2]
end
if #all <= wanted then return {{'', '', found}} end
return {{found[#found - 1], found[#found], found}}
""",
)

#: Return the ids of histories of a bucket in their order, some at a time. Keys: those of the bucket. Arguments: the
#: ends of the range, as ZRANGEBYLEX takes them; how many ids; a time, for those that have not changed since, or
#: nothing; the user. Returns the id to go on from, or nothing at the end; then the ids.
BY_ID = Script(
    OF_BUCKET,
    _STILL_THERE,
    """
local wanted, updated_before, user = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local seen = redis.call('ZRANGEBYLEX', names, ARGV[1], ARGV[2], 'LIMIT', 0, wanted)
local found = {}
for _, chat_history_id in ipairs(seen) do
    local time = updated_before and tonumber(redis.call('ZSCORE', directory, chat_history_id) or nil)
    if (not updated_before or time and time < updated_before) and is_still_there(chat_history_id)
            and (user == '' or redis.call('HGET', owners, chat_history_id) == user) then
        found[#found + 1] = chat_history_id
    end
end
return {#seen < wanted and '' or seen[#seen], found}
""",
)

#: Return the ids of the histories of a bucket that have not changed for longest, expired ones included. Keys: those of
#: the bucket. Arguments: a time, for those that have not changed since, or +inf; how many ids; the user.
OLDEST = Script(
    OF_BUCKET,
    """
if ARGV[3] ~= '' then directory = users_key(ARGV[3]) end
local before = ARGV[1] == '+inf' and ARGV[1] or '(' .. ARGV[1]
return redis.call('ZRANGEBYSCORE', directory, '-inf', before, 'LIMIT', 0, ARGV[2])
""",
)

#: Return fields of the hashes of histories. Keys: the bucket's schema version, then each history's hash.
INFOS = Script(f"""
local found = {{}}
for key = 2, #KEYS do found[key - 1] = redis.call('HMGET', KEYS[key], {INFO}) end
return found
""")

#: Return the fields of INFOS of one history, the state of its hash, and of the renaming that has claimed it: the name
#: of the messages that wait for it, the new id, and for how many milliseconds it has claimed it. Keys: the bucket's
#: schema version, the hash.
STATE = Script(
    STATE_OF,
    CLAIM_OF,
    NOW,
    f"""
local since, stage, new_id = claim_of(KEYS[2])
return {{redis.call('HMGET', KEYS[2], {INFO}), state_of(KEYS[2]), stage, new_id, milliseconds - since}}
""",
)

#: Claim a history for a renaming. Keys: the bucket's schema version, the hash. Arguments: the state that the history
#: must have; the name of the messages that wait for the renaming that has claimed it, or nothing if none may have; the
#: name of those that wait for this one; the new id. Returns whether it has claimed it.
CLAIM = Script(
    STATE_OF,
    CLAIM_OF,
    NOW,
    """
local _, stage, new_id = claim_of(KEYS[2])
if state_of(KEYS[2]) ~= ARGV[1] then return 0 end
if stage == ARGV[3] then return 1 end  -- by an earlier attempt of this call
if stage ~= ARGV[2] or new_id ~= '' and new_id ~= ARGV[4] then return 0 end
redis.call('UNLINK', KEYS[2] .. ':renamed_to')  -- of an earlier history with this id
redis.call('HSET', KEYS[2], 'claim', string.format('%.0f', milliseconds) .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
return 1
""",
)

#: Give a claim up. Keys: the bucket's schema version, the history's hash. Argument: the name of the messages that wait
#: for the renaming that has claimed it.
GIVE_UP_CLAIM = Script(
    CLAIM_OF,
    """
local _, stage = claim_of(KEYS[2])
return stage == ARGV[1] and redis.call('HDEL', KEYS[2], 'claim') or 0
""",
)

#: Return the new id of the renaming that has deleted a history lately, or nothing. Keys: the bucket's schema version,
#: the history's hash.
RENAMED_TO = Script("return redis.call('GET', KEYS[2] .. ':renamed_to') or ''")

#: Set title, meta and user of a history. Keys: those of the bucket, the history's hash. Arguments: the history's id;
#: how many of the following are names of fields and values, in turn; these; then the names of fields to delete; `=` and
#: a title for a history without one, or nothing; `=` and the meta that the history must have, or nothing for any; the
#: user. Returns the fields of INFOS, or ACCESS, or CHANGED if it has another meta.
UPDATE = Script(
    OF_BUCKET,
    f"""
local chat_history_id, history, set = ARGV[1], KEYS[7], tonumber(ARGV[2])
local default_title, meta, user = unpack(ARGV, #ARGV - 2)
if redis.call('HEXISTS', history, 'message_count') == 1 then
    local owner = redis.call('HGET', history, 'user_id')
    if user ~= '' and owner ~= user then return {{'ACCESS'}} end
    if meta ~= '' and meta ~= '=' .. (redis.call('HGET', history, 'meta') or '') then return {{'CHANGED'}} end
    if set > 0 then redis.call('HSET', history, unpack(ARGV, 3, 2 + set)) end
    if #ARGV > 5 + set then redis.call('HDEL', history, unpack(ARGV, 3 + set, #ARGV - 3)) end
    if default_title ~= '' then redis.call('HSETNX', history, 'title', string.sub(default_title, 2)) end
    local before = owner
    owner = redis.call('HGET', history, 'user_id')
    if owner ~= before then
        remove_documents(history, 0, (tonumber(redis.call('HGET', history, 'next_position')) or 0) - 1)
        unindex(chat_history_id, 0)
        if before then redis.call('ZREM', users_key(before), chat_history_id) end
        if owner then
            local listed_at = redis.call('ZSCORE', directory, chat_history_id)  -- it may have lost the history
                or redis.call('HGET', history, 'updated_at')
            redis.call('ZADD', users_key(owner), tonumber(listed_at or nil) and listed_at or 0, chat_history_id)
            redis.call('HSET', owners, chat_history_id, owner)
        else
            redis.call('HDEL', owners, chat_history_id)
        end
        if redis.call('ZCARD', expiries) > 0 then
            {NOW}
            {AGE_BUCKET}
        end
    end
end
return redis.call('HMGET', history, {INFO})
""",
)

#: Return the letters of the roles and the times of messages. Keys: the bucket's schema version, then the hash, the
#: roles and the times of each history. Arguments: of each, the first position and the last; then the user. Of a
#: history of another user, it returns nothing.
TIMES = Script(f"""
local found, user = {{}}, ARGV[#ARGV]
for index = 1, #KEYS / 3 do
    local history, roles, times = unpack(KEYS, 3 * index - 1, 3 * index + 1)
    local first, last = tonumber(ARGV[2 * index - 1]), tonumber(ARGV[2 * index])
    if user == '' or redis.call('HGET', history, 'user_id') == user then
        found[2 * index - 1] = redis.call('GETRANGE', roles, first, last)
        found[2 * index] = redis.call('GETRANGE', times, {TIME_LENGTH} * first,
            {TIME_LENGTH} * (last + 1) - 1)
    else
        found[2 * index - 1], found[2 * index] = false, false
    end
end
return found
""")

#: Return the replies that say something of their token usage. Keys: the bucket's schema version, then the hash, the
#: roles, the times and the contents of a history. Arguments: the first position and the last; the user. Returns the
#: position to go on from, -1 if the history is another user's; then times and contents in turn.
USAGE = Script(f"""
local _, history, roles, times, contents = unpack(KEYS)
if ARGV[3] ~= '' and redis.call('HGET', history, 'user_id') ~= ARGV[3] then return {{-1, {{}}}} end
local found, first, size = {{}}, tonumber(ARGV[1]), 0
local letters = redis.call('GETRANGE', roles, first, ARGV[2])
if string.find(letters, 'a', 1, true) then
    for index, content in ipairs(redis.call('LRANGE', contents, first, ARGV[2])) do
        if string.sub(letters, index, index) == 'a' and string.find(content, '"usage":', 1, true) then
            local start = {TIME_LENGTH} * (first + index - 1)
            found[#found + 1] = redis.call('GETRANGE', times, start, start + {TIME_LENGTH} - 1)
            found[#found + 1] = content
            size = size + #content
            if size > {_USAGE_SIZE} then return {{first + index, found}} end
        end
    end
end
return {{ARGV[2] + 1, found}}
""")

#: Delete histories of a bucket. Keys: those of the bucket, then those of the histories. Arguments: a time, for those
#: that have not changed since, or nothing; the revision that a history that is there must have, or nothing; the user;
#: whether a history of another user is an error, 1 or 0, or left out; the state that a history that is there must have
#: and, after a blank, the new id that it must be claimed for, or nothing for any; the histories' ids. Returns how many
#: there were, 1 if one of them may have branches, the user of the last one: nothing if it was not there, or else a =
#: and the user, if it had one; and the old id of the last one, if its renaming is not done; or ACCESS, or CHANGED and
#: a revision.
DELETE = Script(
    OF_BUCKET,
    STATE_OF,
    CLAIM_OF,
    f"""
redis.call('ZCARD', directory)
redis.call('ZCARD', names)
local expiring, deleted = redis.call('ZCARD', expiries), 0
local kept_revision = tonumber(redis.call('GET', deleted_revision) or 0)
local updated_before, greatest = tonumber(ARGV[1]), kept_revision
local of_history = (#KEYS - 6) / (#ARGV - 5)
local user, owner, branched, owner_then, renamed_from = ARGV[3], false, 0, '', ''
local wanted_state, wanted_claim = string.match(ARGV[5], '^(%x+) ?(.*)$')
local function is_wanted(history)
    local _, _, new_id = claim_of(history)
    return state_of(history) == wanted_state and (wanted_claim == '' or new_id == wanted_claim)
end
for index = 6, #ARGV do
    local time = updated_before and tonumber(redis.call('ZSCORE', directory, ARGV[index]) or nil)
    local first = 7 + (index - 6) * of_history
    local is_there = redis.call('EXISTS', KEYS[first]) == 1
    local is_other = user ~= '' and is_there and redis.pcall('HGET', KEYS[first], 'user_id') ~= user
    if is_other and ARGV[4] == '1' then return {{'ACCESS', ''}} end
    -- If the user's directory lists what is not this user's, it must not be found again.
    if user ~= '' and (is_other or not is_there) then redis.call('ZREM', users_key(user), ARGV[index]) end
    if not is_other and (not time or time < updated_before) then
        local revision = tonumber(redis.pcall('HGET', KEYS[first], 'revision') or nil)  -- it may be damaged
        if revision and ARGV[2] ~= '' and tonumber(ARGV[2]) ~= revision then return {{'CHANGED', revision}} end
        if is_there and wanted_state and not is_wanted(KEYS[first]) then return {{'CHANGED', revision}} end
        greatest = math.max(greatest, revision or 0)
        if not is_there or redis.call('SISMEMBER', origins, ARGV[index]) == 1 then branched = 1 end
        if ARGV[4] == '1' then redis.call('SREM', origins, ARGV[index]) end
        local their_owner = is_there and redis.pcall('HGET', KEYS[first], 'user_id')
        renamed_from = is_there and redis.pcall('HEXISTS', KEYS[first], 'renaming') == 1
            and redis.call('HGET', KEYS[first], 'renamed_from') or ''
        owner_then = is_there and '=' .. (type(their_owner) == 'string' and their_owner or '') or ''
        if is_searched then
            local lengths = {{redis.pcall('LLEN', KEYS[first + 1]), redis.pcall('STRLEN', KEYS[first + 2])}}
            remove_documents(KEYS[first], 0, math.max(tonumber(lengths[1]) or 0, tonumber(lengths[2]) or 0) - 1)
        end
        if redis.call('UNLINK', unpack(KEYS, first, first + of_history - 1)) > 0 then deleted = deleted + 1 end
        if is_there and wanted_claim and wanted_claim ~= '' then
            redis.call('SET', KEYS[first] .. ':renamed_to', wanted_claim, 'PX', {RENAMED_TO_MILLISECONDS})
        end
        for _, key in ipairs({{directory, names, expiries, unindexed}}) do redis.call('ZREM', key, ARGV[index]) end
        local gone_user = redis.call('HGET', owners, ARGV[index])
        if gone_user then
            redis.call('ZREM', users_key(gone_user), ARGV[index])
            redis.call('HDEL', owners, ARGV[index])
        end
    end
end
if greatest > kept_revision then redis.call('SET', deleted_revision, greatest) end
if expiring > 0 then
    {NOW}
    {AGE_BUCKET}
end
if redis.call('EXISTS', directory) == 0 then redis.call('UNLINK', schema_version, origins) end
return {{deleted, branched, owner_then, renamed_from}}
""",
)

#: Give a history another id. Keys: those of its bucket, its own; those of the other bucket, of the other id.
#: Arguments: the history's id; the other one; a name for this call; a new meta, or nothing if it keeps its own; the
#: meta that it has, if it gets a new one; the user. Returns the fields of INFOS, also if an earlier attempt has done
#: it, or ACCESS, or EXISTS if there is a history with the other id, or MISSING if there is none with the first, or
#: CHANGED if it has another meta, or UNFINISHED if another renaming of it is not done. That this one is not done, since
#: its branches are to follow, is noted, too.
RENAME = Script(
    OF_BUCKET_AND_HISTORY,
    f"""
local old_id, new_id, renamed = ARGV[1], ARGV[2], {{unpack(KEYS, 18, 22)}}
local version_there = redis.call('GET', KEYS[12])
if version_there and tonumber(version_there) > {SCHEMA_VERSION} then
    return redis.error_reply('NEWERSCHEMA ' .. version_there)
end
local there = redis.call('HMGET', renamed[1], 'created_at', 'user_id', 'renamed_from', 'calls')
local call = ARGV[3]
local is_done = is_new and there[3] == old_id or string.find(there[4] or '', call .. '=', 1, true)
if is_new and not is_done then return {{'MISSING'}} end
if there[1] and user ~= '' and there[2] ~= user then return {{'ACCESS'}} end
if is_done then return redis.call('HMGET', renamed[1], {INFO}) end
if redis.call('HEXISTS', history, 'renaming') + redis.call('HEXISTS', history, 'claim') > 0 then
    return {{'UNFINISHED'}}
end
if there[1] then return {{'EXISTS'}} end
if ARGV[4] ~= '' and ARGV[5] ~= (redis.call('HGET', history, 'meta') or '') then return {{'CHANGED'}} end
if redis.call('EXISTS', unpack(renamed)) > 0 then return redis.error_reply('DAMAGED ' .. renamed[1]) end
local revision_there = tonumber(redis.call('GET', KEYS[16]) or 0)
for key = 13, 15 do redis.call('ZCARD', KEYS[key]) end
{NOW}

local new_revision = math.max(revision, revision_there) + 1
redis.call('HSET', history, 'chat_history_id', new_id, 'revision', new_revision, 'renamed_from', old_id,
    'renaming', '-')
if ARGV[4] ~= '' then redis.call('HSET', history, 'meta', ARGV[4]) end
for index, key in ipairs({{history, contents, roles, message_ids, times}}) do
    if redis.call('EXISTS', key) == 1 then redis.call('RENAME', key, renamed[index]) end
end
remove_documents(history, 0, position - 1)
for _, key in ipairs({{directory, names, expiries, unindexed}}) do redis.call('ZREM', key, old_id) end
if owner then
    redis.call('ZREM', users_key(owner), old_id)
    redis.call('HDEL', owners, old_id)
end
if revision > kept_revision then redis.call('SET', deleted_revision, revision) end
if expiring > 0 then
    {AGE_BUCKET}
end
if redis.call('EXISTS', directory) == 0 then redis.call('UNLINK', schema_version, origins) end

-- From here on, the names stand for what belongs to the other id.
local chat_history_id, updated_at, result = new_id, last_updated_at or created_at, 0
local known_calls = redis.call('HGET', renamed[1], 'calls') or ''
is_new, revision, kept_revision = true, new_revision, revision_there
history, contents, roles, message_ids, times = unpack(renamed)
schema_version, directory, expiries, names, deleted_revision, owners = unpack(KEYS, 12, 17)
bucket = string.sub(schema_version, 1, -16)
origins = bucket .. ':origins'
version, expiring = redis.call('GET', schema_version), redis.call('ZCARD', expiries)
is_searched, unindexed = redis.call('EXISTS', bucket .. ':search') == 1, bucket .. ':unindexed'
unindex(new_id, 0)
{LIST_HISTORY}
{REMEMBER_CALL}
{SET_EXPIRY}
{KEEP_REVISION}
if expires_at or expiring > 0 then
    {AGE_BUCKET}
end
return redis.call('HMGET', history, {INFO})
""",
)

#: Note that the renaming of a history is done, once the one with the old id is gone, and its branches have followed.
#: Keys: the bucket's schema version, the history's hash. Argument: the old id.
END_RENAMING = Script("""
return redis.call('HGET', KEYS[2], 'renamed_from') == ARGV[1] and redis.call('HDEL', KEYS[2], 'renaming') or 0
""")

#: Note that a history of a bucket, which may come later, has branches. Keys: those of the bucket. Argument: its id.
NOTE_ORIGIN = Script(OF_BUCKET, "return redis.call('SADD', origins, ARGV[1])")

#: Return 1 if a history has branches, or had some, otherwise 0. Keys: those of its bucket. Argument: its id.
HAS_BRANCHES = Script(OF_BUCKET, "return redis.call('SISMEMBER', origins, ARGV[1])")

#: Forget which histories have branches, if the bucket has none. Keys: those of the bucket.
FORGET_ORIGINS = Script(OF_BUCKET, "if redis.call('EXISTS', directory) == 0 then redis.call('UNLINK', origins) end")

#: Return all ids that a bucket lists, expired ones included. Keys: those of the bucket.
ALL = Script(
    OF_BUCKET,
    """
local found = redis.call('ZUNION', 3, directory, names, expiries)
for _, owned in ipairs(redis.call('HKEYS', owners)) do
    if not redis.call('ZSCORE', names, owned) then found[#found + 1] = owned end
end
return found
""",
)

#: Find out whether the directory of a user lists a history that is not this user's. Keys: those of the bucket, the
#: history's hash. Arguments: its id; the user; whether to take it from the directory, 1 or 0. Returns 1 if it is so.
CHECK_LISTING = Script(
    OF_BUCKET,
    _STILL_THERE,
    """
local is_own = redis.call('HGET', KEYS[7], 'user_id') == ARGV[2]
if is_own or not redis.call('ZSCORE', users_key(ARGV[2]), ARGV[1]) or not is_still_there(ARGV[1]) then return 0 end
if ARGV[3] == '1' then redis.call('ZREM', users_key(ARGV[2]), ARGV[1]) end
return 1
""",
)
