// Reads batches as the Java client's consumer does: checks each one's checksum and prints its records.
//
//     java -cp 'JARS/*' ReadBatches.java < batches
//
// stdin: a batch a line, in hex. stdout: for each record "LINE OFFSET TIMESTAMP KEY VALUE HEADERS" in the notation of
// cases.py (as_text); for a transaction marker "LINE marker TYPE COORDINATOR_EPOCH PRODUCER_ID PRODUCER_EPOCH".

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.record.internal.EndTransactionMarker;
import org.apache.kafka.common.record.internal.MemoryRecords;
import org.apache.kafka.common.record.internal.MutableRecordBatch;
import org.apache.kafka.common.record.internal.Record;

public class ReadBatches {
    static String field(ByteBuffer buffer) {
        if (buffer == null) return "-";
        byte[] copy = new byte[buffer.remaining()];
        buffer.duplicate().get(copy);
        return "x" + HexFormat.of().formatHex(copy);
    }

    static String headers(Header[] headers) {
        List<String> parts = new ArrayList<>();
        for (Header header : headers) {
            String name = "x" + HexFormat.of().formatHex(header.key().getBytes(StandardCharsets.UTF_8));
            parts.add(name + "=" + (header.value() == null ? "-" : "x" + HexFormat.of().formatHex(header.value())));
        }
        return parts.isEmpty() ? "-" : String.join(",", parts);
    }

    public static void main(String[] arguments) throws Exception {
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        int number = 0;
        for (String line = input.readLine(); line != null; line = input.readLine(), number++) {
            MemoryRecords records = MemoryRecords.readableRecords(ByteBuffer.wrap(HexFormat.of().parseHex(line)));
            for (MutableRecordBatch batch : records.batches()) {
                batch.ensureValid();
                for (Record record : batch) {
                    if (batch.isControlBatch()) {
                        EndTransactionMarker marker = EndTransactionMarker.deserialize(record);
                        System.out.println(number + " marker " + marker.controlType() + " " + marker.coordinatorEpoch()
                            + " " + batch.producerId() + " " + batch.producerEpoch());
                    } else {
                        record.ensureValid();
                        System.out.println(number + " " + record.offset() + " " + record.timestamp() + " "
                            + field(record.key()) + " " + field(record.value()) + " " + headers(record.headers()));
                    }
                }
            }
        }
    }
}
