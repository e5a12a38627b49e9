---- MODULE SinkFence ----
(* A sink: effects, position and owner epoch in one database transaction, under rebalances that zombies do not notice.
   Code: sinks/engine.py, sinks/sql/positions.py. Rule: the position lives with the effects; fences, not leases.

   GUARD "epoch"  a new owner raises the epoch before it reads the position; every write compares it   (ours)
         "cas"    every write compares the position that it started from
         "none"   the position is written blindly
   FROM_DB        the owner starts where the database says; otherwise at the group's committed offset
   READ_FIRST     the owner reads the position before it raises the epoch (the order that a hurry gets wrong)       *)
EXTENDS Naturals
CONSTANTS GUARD, FROM_DB, READ_FIRST, Workers, Records, Rebalances
VARIABLES
  generation,   \* of the group
  mine,         \* worker -> the generation in which it got the partition
  at,           \* worker -> position of its last commit
  seen,         \* worker -> position up to which it has polled
  pc,           \* worker -> "idle", "assigned", "fenced", "run", "dead"
  position,     \* in the database
  owner,        \* owner epoch in the database
  effects,      \* offset -> how often its effect is in the database
  committed     \* the group's offset
vars == <<generation, mine, at, seen, pc, position, owner, effects, committed>>

Init == /\ generation = 0 /\ mine = [w \in Workers |-> 0] /\ at = [w \in Workers |-> 0] /\ seen = [w \in Workers |-> 0]
        /\ pc = [w \in Workers |-> "idle"] /\ position = 0 /\ owner = 0 /\ committed = 0
        /\ effects = [o \in 1..Records |-> 0]

\* The group gives the partition to w; the former owner is paused and does not hear of it.
Assign(w) == /\ generation < Rebalances /\ generation' = generation + 1
             /\ mine' = [mine EXCEPT ![w] = generation + 1] /\ pc' = [pc EXCEPT ![w] = "assigned"]
             /\ UNCHANGED <<at, seen, position, owner, effects, committed>>

Start == IF FROM_DB THEN position ELSE committed
Read(w) == at' = [at EXCEPT ![w] = Start] /\ seen' = [seen EXCEPT ![w] = Start]

\* Raising the epoch is one statement, reading the position the next: a zombie may commit between the two.
Raise(w) == /\ pc[w] = (IF READ_FIRST THEN "fenced" ELSE "assigned")
            /\ IF GUARD = "epoch" /\ owner > mine[w] THEN pc' = [pc EXCEPT ![w] = "dead"] /\ UNCHANGED owner
               ELSE /\ owner' = IF GUARD = "epoch" THEN mine[w] ELSE owner
                    /\ pc' = [pc EXCEPT ![w] = IF READ_FIRST THEN "run" ELSE "fenced"]
            /\ UNCHANGED <<generation, mine, at, seen, position, effects, committed>>
Take(w) == /\ pc[w] = (IF READ_FIRST THEN "assigned" ELSE "fenced")
           /\ Read(w) /\ pc' = [pc EXCEPT ![w] = IF READ_FIRST THEN "fenced" ELSE "run"]
           /\ UNCHANGED <<generation, mine, position, owner, effects, committed>>

Poll(w) == /\ pc[w] = "run" /\ seen[w] < Records /\ seen' = [seen EXCEPT ![w] = @ + 1]
           /\ UNCHANGED <<generation, mine, at, pc, position, owner, effects, committed>>

May(w) == CASE GUARD = "none" -> TRUE [] GUARD = "cas" -> position = at[w] [] GUARD = "epoch" -> owner = mine[w]
\* One database transaction: the effects of the batch, and the position behind it - if the guard holds.
Commit(w) == /\ pc[w] = "run" /\ seen[w] > at[w]
             /\ IF May(w)
                THEN /\ effects' = [o \in 1..Records |-> IF at[w] < o /\ o <= seen[w] THEN effects[o] + 1 ELSE effects[o]]
                     /\ position' = seen[w] /\ at' = [at EXCEPT ![w] = seen[w]] /\ UNCHANGED pc
                ELSE pc' = [pc EXCEPT ![w] = "dead"] /\ UNCHANGED <<effects, position, at>>
             /\ UNCHANGED <<generation, mine, seen, owner, committed>>

\* The group's offset follows, for lag tools; a former generation's is refused.
Report(w) == /\ pc[w] = "run" /\ mine[w] = generation /\ committed # at[w] /\ committed' = at[w]
             /\ UNCHANGED <<generation, mine, at, seen, pc, position, owner, effects>>

Next == \E w \in Workers : Assign(w) \/ Raise(w) \/ Take(w) \/ Poll(w) \/ Commit(w) \/ Report(w)
Spec == Init /\ [][Next]_vars

NothingTwice == \A o \in 1..Records : effects[o] <= 1
NothingSkipped == \A o \in 1..Records : o <= position => effects[o] >= 1
====
