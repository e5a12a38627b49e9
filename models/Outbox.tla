---- MODULE Outbox ----
(* One lane of an outbox: rows in a database, a relay that publishes them, its manifests in the same Kafka transactions,
   relays that die, stand still and come back, and a database that is put back to a backup.
   Code: outbox/lane.py, outbox/takeover.py, outbox/store.py. Rule: whoever takes the lane over fences the predecessor in
   Kafka, then reads the last manifest, then deletes exactly what it lists; there is no cursor.

   DELETE   "exact"  the rows of the manifest, one by one   (ours)
            "range"  every row between the lowest and the highest of them
   UPTO     "hw"     the manifest is read up to the high watermark seen after the fence, waiting for the LSO   (ours)
            "lso"    up to the last stable offset, which another lane's open transaction may hold below
   LIST     "all"    a manifest lists every batch that is not deleted   (ours)
            "last"   its own batch only
   FENCE    "first"  fence, then read the manifest   (ours)
            "after"  read the manifest, then fence
   COMPARE  whether a database that went back is noticed by its batch number, and compared with the topics            *)
EXTENDS Naturals, Sequences, FiniteSets
CONSTANTS DELETE, UPTO, LIST, FENCE, COMPARE, Relays, Rows, Takeovers, Depth
VARIABLES
  table,      \* the rows in the database
  written,    \* rows that were committed, in the life of the database that counts
  epoch,      \* owner_epoch of the lane in the database
  batch,      \* the last batch whose rows were deleted, in the database
  log,        \* the manifests in Kafka, in order; each is visible together with its rows
  published,  \* row -> how often it is in the topic
  fence,      \* the producer epoch of the lane's transactional id
  relay,      \* what each relay knows
  backup,     \* a copy of the database, or none
  restored    \* whether it was put back
vars == <<table, written, epoch, batch, log, published, fence, relay, backup, restored>>
db == <<table, written, epoch, batch>>
kafka == <<log, published, fence>>

Idle == [pc |-> "idle", e |-> 0, k |-> 0, hw |-> 0, row |-> 0, b |-> 0, del |-> {}, again |-> FALSE, sel |-> {}, und |-> <<>>]
Max(a, b) == IF a > b THEN a ELSE b
Listed(und) == UNION {und[i].rows : i \in 1..Len(und)}

Init == /\ table = {} /\ written = {} /\ epoch = 0 /\ batch = 0 /\ log = <<>> /\ published = [x \in Rows |-> 0]
        /\ fence = 0 /\ relay = [r \in Relays |-> Idle] /\ backup = <<>> /\ restored = FALSE

\* Rows are committed in any order of their numbers: a lower one may come late.
Write(x) == /\ x \notin written /\ published[x] = 0 /\ table' = table \cup {x} /\ written' = written \cup {x}
            /\ UNCHANGED <<epoch, batch, kafka, relay, backup, restored>>

Set(r, s) == relay' = [relay EXCEPT ![r] = s]
Acquire(r) == /\ relay[r].pc = "idle" /\ fence < Takeovers /\ epoch' = epoch + 1
              /\ Set(r, [Idle EXCEPT !.pc = IF FENCE = "first" THEN "owner" ELSE "inited", !.e = epoch + 1, !.row = batch])
              /\ UNCHANGED <<table, written, batch, kafka, backup, restored>>
\* InitProducerId: what the predecessor had open is decided, and he commits nothing more, so that the high watermark which
\* is asked for after it is the one of this moment.
Fence(r) == /\ relay[r].pc = (IF FENCE = "first" THEN "owner" ELSE "read") /\ fence < Takeovers /\ fence' = fence + 1
            /\ Set(r, [relay[r] EXCEPT !.pc = IF FENCE = "first" THEN "inited" ELSE "known", !.k = fence + 1, !.hw = Len(log)])
            /\ UNCHANGED <<db, log, published, backup, restored>>

\* The last manifest says what to delete, and whether the database went back.
Read(r) == \E end \in 0..Len(log) :
           LET me == relay[r]
               none == end = 0
               last == log[end]
               back == COMPARE /\ ~none /\ (last.first > me.row + 1 \/ last.n < me.row)
           IN /\ me.pc = "inited"
              \* The last stable offset may be anywhere below; who waits for it reads up to the end.
              /\ UPTO = "hw" => end = IF FENCE = "first" THEN me.hw ELSE Len(log)
              /\ Set(r, [me EXCEPT !.pc = IF FENCE = "first" THEN "known" ELSE "read",
                                   !.del = IF none THEN {} ELSE last.rows,
                                   !.b = IF none THEN me.row ELSE Max(me.row, last.n), !.again = back])
              /\ UNCHANGED <<db, kafka, backup, restored>>

Span(rows) == IF DELETE = "exact" \/ rows = {} THEN rows
              ELSE {x \in Rows : \E a, b \in rows : a <= x /\ x <= b}

\* One database transaction: delete what a predecessor had published, and note the batch if the lane is still ours.
Clean(r) == LET me == relay[r] IN
            /\ me.pc = "known" /\ ~me.again /\ table' = table \ Span(me.del)
            /\ IF epoch = me.e THEN batch' = Max(batch, me.b) /\ Set(r, [me EXCEPT !.pc = "run", !.del = {}])
               ELSE UNCHANGED batch /\ Set(r, Idle)
            /\ UNCHANGED <<written, epoch, kafka, backup, restored>>
\* After a restore: what is in the topics is deleted; then an empty manifest ends it, then the database notes that.
Compare(r) == LET me == relay[r] IN
              /\ me.pc = "known" /\ me.again /\ table' = {x \in table : published[x] = 0} \ me.del
              /\ Set(r, [me EXCEPT !.pc = "compared"])
              /\ UNCHANGED <<written, epoch, batch, kafka, backup, restored>>
Finish(r) == LET me == relay[r] IN
             /\ me.pc = "compared"
             /\ IF me.k = fence
                THEN /\ log' = Append(log, [n |-> me.b + 1, first |-> me.b + 1, rows |-> {}])
                     /\ \/ Set(r, [me EXCEPT !.pc = "run", !.b = me.b + 1, !.del = {}, !.again = FALSE,
                                             !.und = <<[n |-> me.b + 1, rows |-> {}]>>])
                        \/ Set(r, Idle)
                ELSE Set(r, Idle) /\ UNCHANGED log
             /\ UNCHANGED <<db, published, fence, backup, restored>>

\* Rows in hand are not read again. The next batch is read while the one before is being deleted.
Select(r) == LET me == relay[r] rows == table \ Listed(me.und) IN
             /\ me.pc = "run" /\ me.sel = {} /\ Len(me.und) < Depth /\ rows # {}
             /\ Set(r, [me EXCEPT !.sel = rows]) /\ UNCHANGED <<db, kafka, backup, restored>>

\* The Kafka transaction of rows and manifest; or the relay is fenced, or never hears how it ended.
Commit(r) == LET me == relay[r]
                 all == Append(me.und, [n |-> me.b + 1, rows |-> me.sel])
                 listed == IF LIST = "all" THEN all ELSE <<all[Len(all)]>>
             IN /\ me.pc \in {"run", "cut"} /\ me.sel # {}
                /\ IF me.k = fence
                   THEN /\ log' = Append(log, [n |-> me.b + 1, first |-> listed[1].n, rows |-> Listed(listed)])
                        /\ published' = [x \in Rows |-> IF x \in me.sel THEN published[x] + 1 ELSE published[x]]
                        /\ \/ me.pc = "run" /\ Set(r, [me EXCEPT !.b = me.b + 1, !.sel = {}, !.und = all])
                           \/ Set(r, Idle)
                   ELSE Set(r, Idle) /\ UNCHANGED <<log, published>>
                /\ UNCHANGED <<db, fence, backup, restored>>

\* One database transaction: delete what is committed in Kafka; a former owner deletes, too, and notes nothing.
Delete(r) == LET me == relay[r] IN
             /\ me.pc = "run" /\ me.und # <<>> /\ table' = table \ Span(Listed(me.und))
             /\ IF epoch = me.e
                THEN batch' = me.und[Len(me.und)].n /\ Set(r, [me EXCEPT !.und = <<>>])
                ELSE UNCHANGED batch /\ Set(r, Idle)
             /\ UNCHANGED <<written, epoch, kafka, backup, restored>>

Crash(r) == /\ relay[r].pc \in {"known", "compared", "run"} /\ Set(r, Idle) /\ UNCHANGED <<db, kafka, backup, restored>>

Backup == /\ backup = <<>> /\ backup' = <<[table |-> table, written |-> written, epoch |-> epoch, batch |-> batch]>>
          /\ UNCHANGED <<db, kafka, relay, restored>>
\* Every session ends with it. What a relay has sent to Kafka may still be committed there.
Restore == /\ backup # <<>> /\ ~restored /\ restored' = TRUE
           /\ table' = backup[1].table /\ written' = backup[1].written
           /\ epoch' = backup[1].epoch /\ batch' = backup[1].batch
           /\ relay' = [r \in Relays |-> IF relay[r].sel # {} THEN [relay[r] EXCEPT !.pc = "cut"] ELSE Idle]
           /\ UNCHANGED <<kafka, backup>>

Next == \/ \E x \in Rows : Write(x)
        \/ \E r \in Relays : \/ Acquire(r) \/ Fence(r) \/ Read(r) \/ Clean(r) \/ Compare(r) \/ Finish(r)
                             \/ Select(r) \/ Commit(r) \/ Delete(r) \/ Crash(r)
        \/ Backup \/ Restore
Spec == Init /\ [][Next]_vars

NothingTwice == \A x \in Rows : published[x] <= 1
NothingLost == \A x \in written : x \in table \/ published[x] >= 1
====
