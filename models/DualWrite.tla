---- MODULE DualWrite ----
(* The atomic dual write of one slot (KIP-939): prepare in Kafka, decide in the database, complete in Kafka. Any instance may claim
   the slot at any time: as the next owner, as one of two recoverers that overlap, over an owner that is stopped and comes back.
   Code: src/semel/dualwrite, client/transaction.py (prepare, complete, keep_prepared).

   An identity <<pid, epoch>> of Kafka is one rising number here. What is sent to Kafka arrives late, repeatedly or never; completing
   goes on in the background. At most one database transaction has reached its last statement, which locks the row of the slot; its
   COMMIT is on the way from then on. Crashes: an app forgets everything, and what it sent goes on; the database drops or does the
   COMMIT that is on its way, also one that others see already and that is not on its disk yet (InnoDB lets its locks go first); Kafka
   drops the transaction whose records it has not acknowledged.

   ORDER   a claim initialises in Kafka, then raises the fence and reads the decision at once ("right"); or it does that the other
           way round ("database first"); or it raises the fence in a second transaction after reading ("read apart")
   FENCE   the counter beside the decision ("own"), the epoch that Kafka gave, which starts again at 0 ("kafka"), or "none"
   SETTLE  a COMMIT without an answer is settled by the row under its lock ("right"), without waiting for the lock ("no lock"),
           without looking whose row it is by now ("no owner"), or without a write that takes what it saw to the disk ("no write")
   TWO_PHASE  what is prepared never times out; V2  every transaction has its own identity                                        *)
EXTENDS Naturals, TLC
CONSTANTS ORDER, FENCE, SETTLE, TWO_PHASE, V2, Instances, Transactions, Identities
VARIABLES pc, me, id, open, ended, wire, outcome, row, pending, applied, disk, lied, n
kafka == <<id, open, ended, wire, outcome>>
database == <<row, pending, applied, disk>>
vars == <<pc, me, kafka, database, lied, n>>
\* me: what an instance remembers: its identity and epoch, the open transaction that Kafka told it of, the decision it read, its own transaction
\* id: the only identity that Kafka obeys; open: the open transaction and its identity; ended: whose EndTxn is answered; wire: EndTxns
\* row: the slot's fence and decision; pending: the database transaction that holds the row's lock; applied: transactions whose rows are there
\* disk: what of the database a crash leaves
None == [t |-> 0, id |-> 0]
Fresh == [id |-> 0, epoch |-> 0, ongoing |-> 0, found |-> 0, t |-> 0]
Off == IF ORDER = "database first" THEN "fence" ELSE "init"                        \* a process that has not claimed yet, or no more
Init == /\ pc = [i \in Instances |-> Off] /\ me = [i \in Instances |-> Fresh] /\ lied = FALSE /\ n = 0
        /\ id = 0 /\ open = None /\ ended = 0 /\ wire = {} /\ outcome = [t \in 1..Transactions |-> "none"]
        /\ row = [epoch |-> 0, prepared |-> 0] /\ pending = None /\ applied = {} /\ disk = <<row, applied>>
Become(i, where, what) == pc' = [pc EXCEPT ![i] = where] /\ me' = [me EXCEPT ![i] = what]
Leave(i) == Become(i, Off, Fresh)
Owner(m) == [Fresh EXCEPT !.id = m.id, !.epoch = m.epoch]
EndTxn(number, commit) == wire' = IF number < id THEN wire ELSE wire \cup {[id |-> number, commit |-> commit]}
Epoch(i) == IF FENCE = "kafka" THEN me[i].id % 2 ELSE row.epoch + 1
Mine(i) == FENCE = "none" \/ row.epoch = me[i].epoch

\* Claiming: InitProducerId(keepPreparedTxn); the fence and the decision; the end of what was open.
Claimed(i, m) == Become(i, IF m.ongoing = 0 THEN "ready" ELSE "ending", Owner(m))
Completing(m) == IF m.ongoing = 0 THEN {} ELSE {[id |-> m.id, commit |-> m.ongoing = m.found]}
InitProducerId(i) == /\ pc[i] = "init" /\ id' = id + 1
                     /\ LET m == [me[i] EXCEPT !.id = id + 1, !.ongoing = open.id]
                        IN IF ORDER = "database first" THEN Claimed(i, m) /\ wire' = Completing(m)
                           ELSE Become(i, IF ORDER = "right" THEN "fence" ELSE "read", m) /\ wire' = {}
                     /\ UNCHANGED <<open, ended, outcome, database, lied, n>>
ReadApart(i) == /\ pc[i] = "read" /\ pending = None /\ Become(i, "fence", [me[i] EXCEPT !.found = row.prepared])
                /\ UNCHANGED <<kafka, database, lied, n>>
RaiseFence(i) == /\ pc[i] = "fence" /\ pending = None /\ row' = [row EXCEPT !.epoch = Epoch(i)] /\ disk' = <<row', applied>>
                 /\ LET m == [me[i] EXCEPT !.epoch = Epoch(i), !.found = IF ORDER = "read apart" THEN @ ELSE row.prepared]
                    IN IF ORDER = "database first" THEN Become(i, "init", m) /\ UNCHANGED wire
                       ELSE Claimed(i, m) /\ wire' = IF m.id < id THEN wire ELSE wire \cup Completing(m)
                 /\ UNCHANGED <<id, open, ended, outcome, pending, applied, lied, n>>

\* One block: send, prepare, the last statement and COMMIT, what came of it, complete. Whom Kafka refuses gives the slot up.
Begin(i) == /\ pc[i] = "ready" /\ n < Transactions
            /\ IF id # me[i].id THEN Leave(i) /\ UNCHANGED <<open, n>>
               ELSE n' = n + 1 /\ open' = [t |-> n + 1, id |-> id] /\ Become(i, "sent", [me[i] EXCEPT !.t = n + 1])
            /\ UNCHANGED <<id, ended, wire, outcome, database, lied>>
Prepare(i) == /\ pc[i] = "sent" /\ IF open.t = me[i].t THEN Become(i, "prepared", me[i]) ELSE Leave(i)
              /\ UNCHANGED <<kafka, database, lied, n>>
Commit(i) == /\ pc[i] = "prepared" /\ pending = None
             /\ IF Mine(i) THEN pending' = [t |-> me[i].t, id |-> me[i].id] /\ Become(i, "settle", me[i]) /\ UNCHANGED wire
                ELSE EndTxn(me[i].id, FALSE) /\ Leave(i) /\ UNCHANGED pending                        \* Fenced, and says so
             /\ UNCHANGED <<id, open, ended, outcome, row, applied, disk, lied, n>>
\* An answer to COMMIT is one way to know; the row is the other, and after a lost connection the only one.
Settle(i) == /\ pc[i] = "settle" /\ (SETTLE = "no lock" \/ pending = None)
             /\ LET committed == row.prepared = me[i].id
                    known == committed \/ Mine(i) \/ SETTLE = "no owner"                               \* else OutcomeUnknown
                IN /\ lied' = (lied \/ (known /\ committed # (me[i].t \in applied \/ pending.t = me[i].t)))
                   /\ IF known THEN EndTxn(me[i].id, committed) /\ Become(i, "ending", Owner(me[i]))
                      ELSE Leave(i) /\ UNCHANGED wire
             /\ disk' = IF SETTLE = "no write" THEN disk ELSE <<row, applied>>
             /\ UNCHANGED <<id, open, ended, outcome, row, pending, applied, n>>
Answered(i) == /\ pc[i] = "ending"
               /\ IF ended = me[i].id THEN Become(i, "ready", [me[i] EXCEPT !.id = IF V2 THEN @ + 1 ELSE @])
                  ELSE id # me[i].id /\ Leave(i)
               /\ UNCHANGED <<kafka, database, lied, n>>
AppCrash(i) == me[i] # Fresh /\ Leave(i) /\ UNCHANGED <<kafka, database, lied, n>>

\* Kafka: an EndTxn arrives; a transaction times out that is not of two phases; a crash. What is below `id` is refused, and forgotten here.
Ends(commit) == /\ open # None /\ open' = None /\ outcome' = [outcome EXCEPT ![open.t] = IF commit THEN "committed" ELSE "aborted"]
Arrive(m) == /\ m.id = id /\ Ends(m.commit) /\ ended' = id /\ id' = IF V2 THEN id + 1 ELSE id
             /\ wire' = (IF V2 THEN {} ELSE wire) /\ UNCHANGED <<pc, me, database, lied, n>>
TimeOut == /\ ~TWO_PHASE /\ Ends(FALSE) /\ id' = id + 1 /\ wire' = {} /\ UNCHANGED <<pc, me, ended, database, lied, n>>
KafkaCrash == /\ \E i \in Instances : pc[i] = "sent" /\ open.t = me[i].t
              /\ Ends(FALSE) /\ UNCHANGED <<pc, me, id, ended, wire, database, lied, n>>
\* The database: the COMMIT on its way is done, or the database dies before it.
DatabaseCommit == /\ pending # None /\ pending' = None /\ applied' = applied \cup {pending.t}
                  /\ row' = [row EXCEPT !.prepared = pending.id] /\ UNCHANGED <<pc, me, kafka, disk, lied, n>>
DatabaseCrash == /\ pending # None \/ disk # <<row, applied>>
                 /\ pending' = None /\ row' = disk[1] /\ applied' = disk[2] /\ UNCHANGED <<pc, me, kafka, disk, lied, n>>
Flush == disk # <<row, applied>> /\ disk' = <<row, applied>> /\ UNCHANGED <<pc, me, kafka, row, pending, applied, lied, n>>

Next == \/ TimeOut \/ KafkaCrash \/ DatabaseCommit \/ DatabaseCrash \/ Flush \/ \E m \in wire : Arrive(m)
        \/ \E i \in Instances : \/ InitProducerId(i) \/ ReadApart(i) \/ RaiseFence(i) \/ AppCrash(i)
                                \/ Begin(i) \/ Prepare(i) \/ Commit(i) \/ Settle(i) \/ Answered(i)
Spec == Init /\ [][Next]_vars
Alike == Permutations(Instances)
Bounded == id <= Identities /\ row.epoch <= Identities

RowsHaveTheirRecords == \A t \in 1..Transactions : ~(t \in applied /\ outcome[t] = "aborted")
RecordsHaveTheirRows == \A t \in 1..Transactions : ~(outcome[t] = "committed" /\ t \notin applied)
AnswersAreTrue == ~lied
====
