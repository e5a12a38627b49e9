// Writes batches, transaction markers and key hashes as the Java client does.
//
//     java -cp 'JARS/*' WriteBatches.java < cases > java.txt
//
// stdin: a line for each record, "case timestamp key value headers" (see cases.py, as_text), then "key HEX" lines.
// stdout: "batch CASE CODEC HEX", "marker NAME HEX", "murmur2 KEY HASH".

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.apache.kafka.common.compress.Compression;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.internals.RecordHeader;
import org.apache.kafka.common.record.TimestampType;
import org.apache.kafka.common.record.internal.CompressionType;
import org.apache.kafka.common.record.internal.ControlRecordType;
import org.apache.kafka.common.record.internal.EndTransactionMarker;
import org.apache.kafka.common.record.internal.MemoryRecords;
import org.apache.kafka.common.record.internal.MemoryRecordsBuilder;
import org.apache.kafka.common.record.internal.RecordBatch;
import org.apache.kafka.common.utils.Utils;

public class WriteBatches {
    static byte[] bytes(String field) {
        return field.equals("-") ? null : HexFormat.of().parseHex(field.substring(1));
    }

    static Header[] headers(String field) {
        if (field.equals("-")) return new Header[0];
        List<Header> headers = new ArrayList<>();
        for (String pair : field.split(",")) {
            String[] parts = pair.split("=");
            headers.add(new RecordHeader(new String(bytes(parts[0]), StandardCharsets.UTF_8), bytes(parts[1])));
        }
        return headers.toArray(new Header[0]);
    }

    static String hex(ByteBuffer buffer) {
        byte[] copy = new byte[buffer.remaining()];
        buffer.duplicate().get(copy);
        return HexFormat.of().formatHex(copy);
    }

    public static void main(String[] arguments) throws Exception {
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        Map<String, List<String[]>> cases = new LinkedHashMap<>();
        List<String> keys = new ArrayList<>();
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            String[] fields = line.split(" ");
            if (fields[0].equals("key")) keys.add(fields[1]);
            else cases.computeIfAbsent(fields[0], name -> new ArrayList<>()).add(fields);
        }
        for (String name : cases.keySet()) {
            for (CompressionType type : CompressionType.values()) {
                MemoryRecordsBuilder builder = MemoryRecords.builder(ByteBuffer.allocate(1 << 20),
                    RecordBatch.MAGIC_VALUE_V2, Compression.of(type).build(), TimestampType.CREATE_TIME, 0L,
                    RecordBatch.NO_TIMESTAMP, 4242L, (short) 3, 0, true, RecordBatch.NO_PARTITION_LEADER_EPOCH);
                for (String[] record : cases.get(name))
                    builder.append(Long.parseLong(record[1]), bytes(record[2]), bytes(record[3]), headers(record[4]));
                System.out.println("batch " + name + " " + type.name + " " + hex(builder.build().buffer()));
            }
        }
        for (ControlRecordType type : new ControlRecordType[] {ControlRecordType.COMMIT, ControlRecordType.ABORT}) {
            MemoryRecords marker = MemoryRecords.withEndTransactionMarker(123456789012L, 1780000000000L, 0, 4242L,
                (short) 4, new EndTransactionMarker(type, 77));
            System.out.println("marker " + type.name() + " " + hex(marker.buffer()));
        }
        for (String key : keys) System.out.println("murmur2 " + key + " " + Utils.murmur2(bytes(key)));
    }
}
