---- MODULE DualWriteIds ----
(* The dual write on a Kafka that does not hand prepared transactions over: InitProducerId aborts what is open. So each owner of a slot
   works under a transactional id of its own, and a successor ends the decided transaction by its saved name before it fences the old
   ids. Code: src/semel/dualwrite/conditional.py. COMMIT, crashes and what is late are as in DualWrite.tla.

   TIMELY  no transaction times out before somebody has recovered the slot: the condition of this recipe
   ORDER   of an old id, the saved transaction is committed, then the id fenced ("right"), or the other way round ("fence first")
   LOOK    an owner looks at the row once more when its own id is there                                                            *)
EXTENDS Naturals, TLC
CONSTANTS TIMELY, ORDER, LOOK, Instances, Transactions, Owners
VARIABLES pc, me, used, open, wire, outcome, row, resolved, pending, applied, n
kafka == <<used, open, wire, outcome>>
database == <<row, resolved, pending, applied>>
vars == <<pc, me, kafka, database, n>>
\* me: an instance's epoch, the decision it read, the old id that is next, its transaction
\* used: id -> its identity, 0 when nobody ever initialised it; open: id -> the open transaction; wire: EndTxn by identity
\* row: the fence, the transaction decided last and under which id, whether it is known to be ended; resolved: ids up to here are done with
Ids == 1..Owners
Fresh == [epoch |-> 0, t |-> 0, found |-> 0, under |-> 0, at |-> 0]
Nothing == [t |-> 0, epoch |-> 0]
Init == /\ pc = [i \in Instances |-> "off"] /\ me = [i \in Instances |-> Fresh] /\ n = 0
        /\ used = [e \in Ids |-> 0] /\ open = [e \in Ids |-> 0] /\ wire = {} /\ outcome = [t \in 1..Transactions |-> "none"]
        /\ row = [epoch |-> 0, t |-> 0, under |-> 0, ended |-> FALSE] /\ resolved = 0 /\ pending = Nothing /\ applied = {}
Become(i, where, what) == pc' = [pc EXCEPT ![i] = where] /\ me' = [me EXCEPT ![i] = what]
Leave(i) == Become(i, "off", Fresh)
Mine(i) == row.epoch = me[i].epoch
\* Who ended his own transaction goes on with the next identity; InitProducerId goes past it.
End(e, how, by) == /\ open' = [open EXCEPT ![e] = 0] /\ used' = [used EXCEPT ![e] = @ + by]
                   /\ outcome' = IF open[e] = 0 THEN outcome ELSE [outcome EXCEPT ![open[e]] = how]

\* Claiming: the fence and the decision; then the older ids, one after the other; then an id of one's own.
Claim(i) == /\ pc[i] = "off" /\ row.epoch < Owners /\ pending = Nothing /\ row' = [row EXCEPT !.epoch = @ + 1]
            /\ Become(i, IF ORDER = "right" THEN "saved" ELSE "fence",
                      [Fresh EXCEPT !.epoch = row.epoch + 1, !.at = resolved + 1,
                                    !.found = IF row.ended THEN 0 ELSE row.t, !.under = row.under])
            /\ UNCHANGED <<kafka, resolved, pending, applied, n>>
Old(i) == me[i].at < me[i].epoch
\* EndTxn of the saved name, and the row says so: only for its owner. A transaction that is ended already answers the same.
Saved(i) == /\ pc[i] = "saved" /\ Old(i)
            /\ IF me[i].found # 0 /\ me[i].under = me[i].at
               THEN /\ IF open[me[i].at] = me[i].found THEN End(me[i].at, "committed", 1) ELSE UNCHANGED <<open, used, outcome>>
                    /\ Become(i, "said", me[i])
               ELSE /\ UNCHANGED <<open, used, outcome>>
                    /\ IF ORDER = "right" THEN Become(i, "fence", me[i]) ELSE Become(i, "fence", [me[i] EXCEPT !.at = @ + 1])
            /\ UNCHANGED <<wire, database, n>>
Said(i) == /\ pc[i] = "said" /\ pending = Nothing
           /\ IF ~Mine(i) THEN Leave(i) /\ UNCHANGED row
              ELSE /\ row' = [row EXCEPT !.ended = TRUE]
                   /\ IF ORDER = "right" THEN Become(i, "fence", me[i]) ELSE Become(i, "fence", [me[i] EXCEPT !.at = @ + 1])
           /\ UNCHANGED <<kafka, resolved, pending, applied, n>>
Fence(i) == /\ pc[i] = "fence" /\ Old(i)
            /\ IF used[me[i].at] = 0 THEN UNCHANGED <<open, used, outcome>> ELSE End(me[i].at, "aborted", 2)
            /\ IF ORDER = "right" THEN Become(i, "saved", [me[i] EXCEPT !.at = @ + 1]) ELSE Become(i, "saved", me[i])
            /\ UNCHANGED <<wire, database, n>>
Resolved(i) == /\ pc[i] \in {"saved", "fence"} /\ ~Old(i) /\ pending = Nothing
               /\ IF Mine(i) THEN resolved' = me[i].epoch - 1 /\ Become(i, "init", me[i]) ELSE Leave(i) /\ UNCHANGED resolved
               /\ UNCHANGED <<kafka, row, pending, applied, n>>
InitProducerId(i) == /\ pc[i] = "init" /\ used' = [used EXCEPT ![me[i].epoch] = @ + 1]
                     /\ Become(i, IF LOOK THEN "look" ELSE "ready", [me[i] EXCEPT !.at = used[me[i].epoch] + 1])
                     /\ UNCHANGED <<open, wire, outcome, database, n>>
Look(i) == /\ pc[i] = "look" /\ pending = Nothing /\ IF Mine(i) THEN Become(i, "ready", me[i]) ELSE Leave(i)
           /\ UNCHANGED <<kafka, database, n>>

\* One block under the id of one's own; `at` is the identity now.
Begin(i) == /\ pc[i] = "ready" /\ n < Transactions
            /\ IF used[me[i].epoch] # me[i].at THEN Leave(i) /\ UNCHANGED <<open, n>>
               ELSE n' = n + 1 /\ open' = [open EXCEPT ![me[i].epoch] = n + 1] /\ Become(i, "prepared", [me[i] EXCEPT !.t = n + 1])
            /\ UNCHANGED <<used, wire, outcome, database>>
EndTxn(i, commit) == wire' = wire \cup {[e |-> me[i].epoch, id |-> me[i].at, commit |-> commit]}
Commit(i) == /\ pc[i] = "prepared" /\ pending = Nothing
             /\ IF Mine(i) THEN pending' = [t |-> me[i].t, epoch |-> me[i].epoch] /\ Become(i, "settle", me[i]) /\ UNCHANGED wire
                ELSE EndTxn(i, FALSE) /\ Become(i, "ending", me[i]) /\ UNCHANGED pending
             /\ UNCHANGED <<used, open, outcome, row, resolved, applied, n>>
Settle(i) == /\ pc[i] = "settle" /\ pending = Nothing
             /\ IF row.t = me[i].t \/ Mine(i) THEN EndTxn(i, row.t = me[i].t) /\ Become(i, "ending", me[i])
                ELSE Leave(i) /\ UNCHANGED wire
             /\ UNCHANGED <<used, open, outcome, database, n>>
Answered(i) == /\ pc[i] = "ending" /\ used[me[i].epoch] # me[i].at
               /\ IF used[me[i].epoch] = me[i].at + 1 THEN Become(i, "ready", [me[i] EXCEPT !.at = @ + 1, !.t = 0]) ELSE Leave(i)
               /\ UNCHANGED <<kafka, database, n>>
Arrive(m) == /\ used[m.e] = m.id /\ open[m.e] # 0 /\ End(m.e, IF m.commit THEN "committed" ELSE "aborted", 1)
             /\ wire' = wire \ {m} /\ UNCHANGED <<pc, me, database, n>>
TimeOut(e) == ~TIMELY /\ open[e] # 0 /\ End(e, "aborted", 2) /\ UNCHANGED <<pc, me, wire, database, n>>
DatabaseCommit == /\ pending # Nothing /\ pending' = Nothing /\ applied' = applied \cup {pending.t}
                  /\ row' = [row EXCEPT !.t = pending.t, !.under = pending.epoch, !.ended = FALSE]
                  /\ UNCHANGED <<pc, me, kafka, resolved, n>>
DatabaseCrash == pending # Nothing /\ pending' = Nothing /\ UNCHANGED <<pc, me, kafka, row, resolved, applied, n>>
AppCrash(i) == me[i] # Fresh /\ Leave(i) /\ UNCHANGED <<kafka, database, n>>

Next == \/ DatabaseCommit \/ DatabaseCrash \/ \E m \in wire : Arrive(m) \/ \E e \in Ids : TimeOut(e)
        \/ \E i \in Instances : \/ Claim(i) \/ Saved(i) \/ Said(i) \/ Fence(i) \/ Resolved(i) \/ InitProducerId(i) \/ Look(i)
                                \/ Begin(i) \/ Commit(i) \/ Settle(i) \/ Answered(i) \/ AppCrash(i)
Spec == Init /\ [][Next]_vars
Alike == Permutations(Instances)

RowsHaveTheirRecords == \A t \in 1..Transactions : ~(t \in applied /\ outcome[t] = "aborted")
RecordsHaveTheirRows == \A t \in 1..Transactions : ~(outcome[t] = "committed" /\ t \notin applied)
\* What is open under an id that nobody looks at any more is its owner's, who lives.
NothingForgotten == \A e \in Ids : open[e] # 0 /\ e <= resolved => \E i \in Instances : me[i].epoch = e
====
