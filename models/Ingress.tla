---- MODULE Ingress ----
(* One partition of the request log, its owners, and the stored responses in their changelog.
   Code: ingress/owner.py, processing/restore.py, processing/engine.py. Rule: the log decides duplicates; order of taking over.

   A request may stand in the log several times (its client retried). An owner works through the log; for each record it
   opens a transaction {effects and stored response, or only the reply if the response is stored already; input offset}.
   A former owner may be paused at any point and go on as a zombie: it is refused new offsets (group generation), but a
   transaction whose offsets were taken may still write and commit. What protects is the order of taking over:

   STABLE     (1) the offset is fetched only when no transaction with offsets is pending (RequireStable)
   ORDER      "offset_first": then (2) the changelog's end is noted, and (3) restored to, waiting for what is open below it
              "state_first":  the state is restored first, then the offset is fetched
   UPTO       "end": restore to the noted end; "lso": only to the last stable offset                               *)
EXTENDS Naturals, Sequences
CONSTANTS STABLE, ORDER, UPTO, Log, Owners
\* What stands in the log: the first request was sent twice, with another one between.
Requests == <<"a", "b", "a">>
VARIABLES
  generation, mine,   \* of the group; worker -> the generation of its ownership
  pc,                 \* worker -> "idle", "offset", "end", "state", "run", "dead"
  next,               \* worker -> the next position in Log
  upto,               \* worker -> the changelog's end that it restores to
  known,              \* worker -> keys whose response it has
  changelog,          \* sequence of [key, by, state, effect]: stored responses; `effect`: the handler ran for it
  wrote,              \* worker -> its open transaction has its records
  pending,            \* worker -> the offset that its open transaction will commit, 0 for none
  committed           \* the committed offset
vars == <<generation, mine, pc, next, upto, known, changelog, wrote, pending, committed>>
Workers == 1..Owners
None == [w \in Workers |-> 0]
Init == /\ generation = 0 /\ mine = None /\ pc = [w \in Workers |-> "idle"] /\ next = None /\ upto = None
        /\ known = [w \in Workers |-> {}] /\ wrote = [w \in Workers |-> FALSE] /\ changelog = <<>> /\ pending = None /\ committed = 0

Set(f, w, value) == [f EXCEPT ![w] = value]
First == IF ORDER = "offset_first" THEN "offset" ELSE "end"
\* The partition goes to a new owner; one that comes back with a new identity is a new one too.
Assign(w) == /\ w = generation + 1 /\ generation' = w /\ mine' = Set(mine, w, w) /\ pc' = Set(pc, w, First)
             /\ UNCHANGED <<next, upto, known, changelog, wrote, pending, committed>>

FetchOffset(w) == /\ pc[w] = "offset" /\ (STABLE => \A v \in Workers : pending[v] = 0)
                  /\ next' = Set(next, w, committed + 1)
                  /\ pc' = Set(pc, w, IF ORDER = "offset_first" THEN "end" ELSE "run")
                  /\ UNCHANGED <<generation, mine, upto, known, changelog, wrote, pending, committed>>
Open == {i \in DOMAIN changelog : changelog[i].state = "open"}
NoteEnd(w) == /\ pc[w] = "end" /\ pc' = Set(pc, w, "state")
              /\ upto' = Set(upto, w, IF UPTO = "end" \/ Open = {} THEN Len(changelog)
                                      ELSE (CHOOSE i \in Open : \A j \in Open : i <= j) - 1)
              /\ UNCHANGED <<generation, mine, next, known, changelog, wrote, pending, committed>>
Restore(w) == /\ pc[w] = "state" /\ \A i \in Open : i > upto[w]
              /\ known' = Set(known, w, {changelog[i].key : i \in {j \in 1..upto[w] : changelog[j].state = "committed"}})
              /\ pc' = Set(pc, w, IF ORDER = "offset_first" THEN "run" ELSE "offset")
              /\ UNCHANGED <<generation, mine, next, upto, changelog, wrote, pending, committed>>

\* The transaction's records and its offset are sent in any order. A key that is known is only answered again.
Write(w) == /\ pc[w] = "run" /\ next[w] <= Len(Log) /\ ~wrote[w] /\ wrote' = Set(wrote, w, TRUE)
            /\ changelog' = IF Log[next[w]] \in known[w] THEN changelog
                            ELSE Append(changelog, [key |-> Log[next[w]], by |-> w, state |-> "open"])
            /\ UNCHANGED <<generation, mine, pc, next, upto, known, pending, committed>>
\* TxnOffsetCommit: the group compares the generation now, not when the transaction ends (KIP-447).
SendOffset(w) == /\ pc[w] = "run" /\ next[w] <= Len(Log) /\ pending[w] = 0
                 /\ IF mine[w] = generation THEN pending' = Set(pending, w, next[w]) /\ UNCHANGED pc
                    ELSE pc' = Set(pc, w, "dead") /\ UNCHANGED pending
                 /\ UNCHANGED <<generation, mine, next, upto, known, changelog, wrote, committed>>
End(w, state) == /\ changelog' = [i \in DOMAIN changelog |->
                      IF changelog[i].by = w /\ changelog[i].state = "open" THEN [changelog[i] EXCEPT !.state = state]
                      ELSE changelog[i]]
                 /\ wrote' = Set(wrote, w, FALSE) /\ pending' = Set(pending, w, 0)
Commit(w) == /\ pc[w] = "run" /\ wrote[w] /\ pending[w] # 0 /\ End(w, "committed")
             /\ committed' = pending[w]
             /\ known' = Set(known, w, known[w] \cup {Log[next[w]]}) /\ next' = Set(next, w, next[w] + 1)
             /\ UNCHANGED <<generation, mine, pc, upto>>
\* The coordinator aborts what a dead or silent owner left open.
Abort(w) == /\ pc[w] \in {"run", "dead"} /\ (wrote[w] \/ pending[w] # 0)
            /\ End(w, "aborted") /\ pc' = Set(pc, w, "dead")
            /\ UNCHANGED <<generation, mine, next, upto, known, committed>>

Next == \E w \in Workers : \/ Assign(w) \/ FetchOffset(w) \/ NoteEnd(w) \/ Restore(w) \/ Write(w) \/ SendOffset(w)
                           \/ Commit(w) \/ Abort(w)
Spec == Init /\ [][Next]_vars

Ran(key) == {i \in DOMAIN changelog : changelog[i].key = key /\ changelog[i].state = "committed"}
HandledOnce == \A i, j \in DOMAIN changelog :
  (i # j /\ changelog[i].state = "committed" /\ changelog[j].state = "committed") => changelog[i].key # changelog[j].key
NothingSkipped == \A at \in 1..committed : Ran(Log[at]) # {}
====
