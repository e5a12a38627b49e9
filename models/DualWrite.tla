---- MODULE DualWrite ----
(* KIP-939: prepare in Kafka, decide in the database, complete in Kafka; overlapping instances of one transactional id.
   Code: client/transaction.py (prepare, complete, keep_prepared); tests/dual_write.

   FENCE       the database's own counter: a recoverer raises it before it reads what was decided
   TWO_PHASE   a prepared transaction never times out
   READ_FIRST  the recoverer reads the decision before it raises the counter                                       *)
EXTENDS Naturals
CONSTANTS FENCE, TWO_PHASE, READ_FIRST, Instances, Transactions, Crashes
VARIABLES pc, epoch, prepared, found, kepoch, open, outcome, decided, applied, counter, n, crashes
vars == <<pc, epoch, prepared, found, kepoch, open, outcome, decided, applied, counter, n, crashes>>
\* epoch: instance -> its identity; prepared: instance -> the transaction it prepared; found: instance -> decision it read
\* kepoch: Kafka's epoch; open: the open transaction, 0 for none; outcome: what became of each in Kafka
\* decided: the prepared state in the database; applied: transactions whose rows are there; counter: the fence
Init == /\ pc = [i \in Instances |-> "off"] /\ epoch = [i \in Instances |-> 0] /\ prepared = [i \in Instances |-> 0]
        /\ found = [i \in Instances |-> 0] /\ kepoch = 0 /\ open = 0 /\ outcome = [t \in 1..Transactions |-> "none"]
        /\ decided = 0 /\ applied = {} /\ counter = 0 /\ n = 0 /\ crashes = 0
Goto(i, where) == pc' = [pc EXCEPT ![i] = where]

\* InitProducerId(keepPreparedTxn): every earlier identity is fenced, what is open stays open.
TakeOver(i) == /\ pc[i] = "off" /\ kepoch' = kepoch + 1 /\ epoch' = [epoch EXCEPT ![i] = kepoch + 1]
               /\ Goto(i, IF READ_FIRST THEN "read" ELSE "fence")
               /\ UNCHANGED <<prepared, found, open, outcome, decided, applied, counter, n, crashes>>
Fence(i) == /\ pc[i] = "fence"
            /\ IF FENCE /\ counter > epoch[i] THEN Goto(i, "dead") /\ UNCHANGED counter
               ELSE /\ counter' = IF FENCE THEN epoch[i] ELSE counter
                    /\ Goto(i, IF READ_FIRST THEN "complete" ELSE "read")
            /\ UNCHANGED <<epoch, prepared, found, kepoch, open, outcome, decided, applied, n, crashes>>
Read(i) == /\ pc[i] = "read" /\ found' = [found EXCEPT ![i] = decided]
           /\ Goto(i, IF READ_FIRST THEN "fence" ELSE "complete")
           /\ UNCHANGED <<epoch, prepared, kepoch, open, outcome, decided, applied, counter, n, crashes>>
\* complete(): commit what the database decided for, abort everything else.
Complete(i) == /\ pc[i] = "complete"
               /\ IF epoch[i] # kepoch THEN Goto(i, "dead") /\ UNCHANGED <<open, outcome>>
                  ELSE /\ Goto(i, "ready") /\ open' = 0
                       /\ outcome' = IF open = 0 THEN outcome
                                     ELSE [outcome EXCEPT ![open] = IF open = found[i] THEN "committed" ELSE "aborted"]
               /\ UNCHANGED <<epoch, prepared, found, kepoch, decided, applied, counter, n, crashes>>

Prepare(i) == /\ pc[i] = "ready" /\ n < Transactions
              /\ IF epoch[i] # kepoch THEN Goto(i, "dead") /\ UNCHANGED <<open, n, prepared>>
                 ELSE /\ open = 0 /\ n' = n + 1 /\ open' = n + 1
                      /\ prepared' = [prepared EXCEPT ![i] = n + 1] /\ Goto(i, "prepared")
              /\ UNCHANGED <<epoch, found, kepoch, outcome, decided, applied, counter, crashes>>
\* One database transaction: the rows, the prepared state, and the comparison with the fence.
Decide(i) == /\ pc[i] = "prepared"
             /\ IF FENCE /\ counter # epoch[i] THEN Goto(i, "dead") /\ UNCHANGED <<decided, applied>>
                ELSE decided' = prepared[i] /\ applied' = applied \cup {prepared[i]} /\ Goto(i, "decided")
             /\ UNCHANGED <<epoch, prepared, found, kepoch, open, outcome, counter, n, crashes>>
Commit(i) == /\ pc[i] = "decided"
             /\ IF epoch[i] # kepoch \/ open # prepared[i] THEN Goto(i, "dead") /\ UNCHANGED <<open, outcome>>
                ELSE outcome' = [outcome EXCEPT ![prepared[i]] = "committed"] /\ open' = 0 /\ Goto(i, "ready")
             /\ UNCHANGED <<epoch, prepared, found, kepoch, decided, applied, counter, n, crashes>>

Crash(i) == /\ pc[i] # "off" /\ crashes < Crashes /\ crashes' = crashes + 1 /\ Goto(i, "off")
            /\ UNCHANGED <<epoch, prepared, found, kepoch, open, outcome, decided, applied, counter, n>>
TimeOut == /\ ~TWO_PHASE /\ open # 0 /\ outcome' = [outcome EXCEPT ![open] = "aborted"] /\ open' = 0
           /\ kepoch' = kepoch + 1
           /\ UNCHANGED <<pc, epoch, prepared, found, decided, applied, counter, n, crashes>>

Next == TimeOut \/ \E i \in Instances : \/ TakeOver(i) \/ Fence(i) \/ Read(i) \/ Complete(i)
                                        \/ Prepare(i) \/ Decide(i) \/ Commit(i) \/ Crash(i)
Spec == Init /\ [][Next]_vars
Bounded == kepoch <= 8

RowsHaveTheirRecords == \A t \in 1..Transactions : ~(t \in applied /\ outcome[t] = "aborted")
RecordsHaveTheirRows == \A t \in 1..Transactions : ~(outcome[t] = "committed" /\ t \notin applied)
====
